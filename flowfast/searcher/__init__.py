"""The search: one loop (loop.py), its state (state.py), what a method is (plan.py), the methods (methods/).

Named `searcher` because `flowfast.search` is the public function and a package of that name would shadow it.
"""
