#!/usr/bin/env bash
# The recipe's words, each a thin entry to `twolane`: nothing (a menu), proxy, prefill, decode, all, test.
# Settings are environment variables: MODEL, PREFILL_GPU, DECODE_GPU, ... (`twolane config` lists them).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  echo "usage: $0 [proxy|prefill|decode|all|test] [options]    without a word: a menu" >&2
  exit 2
}

word="${1:-menu}"
[ $# -eq 0 ] || shift
case "$word" in
  all) word=up ;;
  menu | proxy | prefill | decode | test) ;;
  *) usage ;;
esac

PYTHON="${PYTHON:-python3}"
if [ -x .venv/bin/python ]; then
  PYTHON=.venv/bin/python
elif ! "$PYTHON" -c "import twolane, typer" 2>/dev/null; then
  exec "$PYTHON" scripts/bootstrap.py "$word" "$@" # installs first
fi
if [ "$word" = proxy ]; then
  exec "$PYTHON" disagg_prefill_proxy_server.py "$@"
fi
exec "$PYTHON" -m twolane.cli "$word" "$@"
