#!/usr/bin/env bash
# One machine: a rank per GPU, or two on CPUs.
#
#   launch/local.sh CONFIG [--nproc N] [--max-restarts N] [--a.b VALUE ...]
#
# When a rank dies, all are started again from the newest checkpoint, three times at most. SIGTERM and SIGUSR1 (to this
# process, not to a rank) end the run after the step at hand, which is saved: the exit code is then 75, "try again", and
# the same command continues. Any other code but 0 is a failure. GRACE (120) are the seconds that they have for it.
set -euo pipefail
[[ $# -gt 0 ]] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2; }

# exec: a signal reaches torchrun itself, with no shell between that could hold it back.
exec "${PYTHON:-python}" -m minizero train --nproc auto --max-restarts 3 "$@"
