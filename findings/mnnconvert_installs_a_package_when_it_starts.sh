#!/usr/bin/env bash
# MNN 3.6.1: the command `mnnconvert` calls `pip install -U aliyun-log-python-sdk` when it starts,
# and with that package sends statistics of each conversion to a server of its maker.
#
# The import of MNN.tools.utils.log runs the first `pip` on the PATH, in whatever environment that
# belongs to. The statistics are the machine's id, the arguments, a number of the model and its size
# (MNN/tools/mnnconvert.py and MNN/tools/utils/log.py). Nothing asks, and no option turns it off.
# `_tools.mnnconvert([...])`, the module behind the command, converts without either.
#
# Here a `pip` that only prints its arguments comes first on the PATH, so nothing is sent.
#
# Seen:
#   pip install -U aliyun-log-python-sdk
#   its sources name: machine_id model_guid put_logs
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check uv
env/bin/uv pip install --quiet --python env/bin/python MNN==3.6.1
mkdir first
printf '#!/bin/sh\necho "pip $*"\n' > first/pip
chmod +x first/pip
tools=$(echo env/lib/python3*/site-packages/MNN/tools)
shown=$(PATH="$folder/first:$PATH" env/bin/mnnconvert --version 2>&1 | grep '^pip' | sort -u || true)
named=$(grep -h -o -w -E 'machine_id|model_guid|put_logs' "$tools"/mnnconvert.py "$tools"/utils/log.py | sort -u | xargs)
printf '%s\nits sources name: %s\n' "$shown" "$named"
case "$shown, $named" in
    'pip install -U aliyun-log-python-sdk, machine_id model_guid put_logs') echo "as described" ;;
    *) echo "changed"; exit 1 ;;
esac
