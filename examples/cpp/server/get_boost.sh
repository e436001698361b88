#!/bin/sh
# Headers of Boost 1.81 or newer: nothing to do where the compiler finds them; else Debian's or Ubuntu's package,
# unpacked into FOLDER (FOLDER/usr is then a prefix for CMake). Needs no root: apt keeps its lists in FOLDER, too.
#   get_boost.sh FOLDER
set -eu
found() {
  printf '#include <boost/version.hpp>\n#if BOOST_VERSION < 108100\n#error too old\n#endif\n' |
    "${CXX:-c++}" -x c++ -fsyntax-only "$@" - 2>/dev/null
}
folder=$1
found || found -isystem "$folder/usr/include" && exit 0

mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial"
cd "$folder"
apt="-q -o Dir::State::Lists=$PWD/lists -o Dir::Cache=$PWD/cache -o APT::Sandbox::User="
apt="$apt -o Acquire::Retries=0 -o Acquire::http::Timeout=20"
unpack() {
  apt-get $apt update >log 2>&1 || return 1
  package=$(apt-cache $apt search --names-only '^libboost1\.[0-9]+-dev$' | cut -d ' ' -f 1 | sort -V | tail -n 1)
  apt-get $apt download "$package" >>log 2>&1 && dpkg -x "$package"_*.deb .
}
if unpack && found -isystem usr/include; then
  rm -rf lists cache log ./*.deb
else
  echo "no headers of Boost 1.81 or newer, and apt did not bring them (see $PWD/log): install them" \
    "(Debian 12: libboost1.81-dev; later ones and Ubuntu 24.04: libboost-dev)" >&2
  exit 1
fi
