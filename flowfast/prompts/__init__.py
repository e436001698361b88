"""Prompts: texts that carry fields along (fields.py), and the reader of lists of them (lists.py)."""

from flowfast.prompts.fields import (
    Prompt,
    check_each,
    check_prompts,
    encoded,
    fault_of,
    faults_of,
    few_of,
    field_of,
    fields_of,
    prompt_of,
    show,
)
from flowfast.prompts.lists import check_no_lists, read_lists, read_prompts

__all__ = [
    "Prompt",
    "check_each",
    "check_no_lists",
    "check_prompts",
    "encoded",
    "fault_of",
    "faults_of",
    "few_of",
    "field_of",
    "fields_of",
    "prompt_of",
    "read_lists",
    "read_prompts",
    "show",
]
