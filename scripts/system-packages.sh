#!/bin/sh
# Installs the system packages that the build, the tests and the demo need, where apt-get exists, and
# those that are named as arguments.
# Says nothing and takes milliseconds when all are there.
set -eu

packages="ffmpeg espeak-ng nlohmann-json3-dev libcli11-dev libgtest-dev libgmock-dev libbenchmark-dev libxxhash-dev $*"
command -v g++ >/dev/null 2>&1 || packages="$packages g++"
command -v ccache >/dev/null 2>&1 || packages="$packages ccache"
"${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || packages="$packages python3 python3-venv"

if ! command -v apt-get >/dev/null 2>&1; then
  # Not Debian: the same things under this system's own names. CMake and the tests say what lacks.
  [ -e .venv/.ready ] || echo "setup: no apt-get here; install what these Debian packages hold: $packages" >&2
  exit 0
fi

missing=""
for package in $packages; do
  case "$(dpkg-query -W -f='${Status}' "$package" 2>/dev/null)" in
    "install ok installed") ;;
    *) missing="$missing $package" ;;
  esac
done
[ -n "$missing" ] || exit 0

sudo=""
if [ "$(id -u)" != 0 ]; then
  command -v sudo >/dev/null 2>&1 || {
    echo "setup: as root, run: apt-get install$missing" >&2
    exit 1
  }
  sudo=sudo
fi
echo "setup: installing system packages:$missing"
$sudo env DEBIAN_FRONTEND=noninteractive apt-get update -qq
# shellcheck disable=SC2086  # one argument per package
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
