#!/usr/bin/env bash
# Run every notebook for the device at hand, or test the repository:  ./run_all.sh [test] [options]
# The options are explained by  ./run_all.sh --help.  Needs Linux or macOS and Python 3.11 or newer.
set -euo pipefail
unset CDPATH
script=${BASH_SOURCE[0]}
while [ -L "$script" ]; do  # called through a symbolic link
  target=$(readlink "$script")
  case "$target" in /*) script=$target ;; *) script=$(dirname "$script")/$target ;; esac
done
here=$(cd "$(dirname "$script")" && pwd)

fail() { echo "run_all.sh: $1" >&2; exit 2; }

# --python PY: an environment that is already there, instead of .venv;  test, wherever it stands: its tools, too
python=""
action=run
next=""
for word in "$@"; do
  case "$next $word" in
    " --python="*) python=${word#--python=} ;;
    " test") action=test ;;
    " --"*=* | " --help" | " -h") ;;
    " --"*) next=$word ; continue ;;  # its value is the next word
    "--python "*) python=$word ;;
  esac
  next=""
done

starter=${python:-python3}
command -v "$starter" >/dev/null || fail "there is no $starter; install Python 3.11 or newer, or name one with --python"
"$starter" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || fail "$starter is older than Python 3.11; name a newer one with --python"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
# bad options are refused before anything is installed
"$starter" -P -m lab.execute --check-only "$@" || exit $?
case " $* " in *" --help "* | *" -h "*) exit 0 ;; esac

if [ -z "$python" ]; then
  python="$here/.venv/bin/python"
  wanted=("$here/requirements.txt")
  [ "$action" = test ] && wanted+=("$here/tests/requirements.txt")
  [ -x "$python" ] || python3 -m venv "$here/.venv"
  for list in "${wanted[@]}"; do
    stamp="$here/.venv/$(cksum < "$list" | tr ' ' -).installed"
    if [ ! -e "$stamp" ]; then
      echo "installing ${list#"$here"/} into .venv (a few minutes, once)"
      "$python" -m pip install --quiet --disable-pip-version-check -r "$list"
      touch "$stamp"
    fi
  done
fi
exec "$python" -P -m lab.execute "$@"
