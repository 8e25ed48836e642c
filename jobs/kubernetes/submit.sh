#!/bin/sh
# Create the RayJob of a date, wait for its end, and report it by the exit code: 0 complete, 3 failed.
#
#   sh submit.sh [DATE]    # yesterday, UTC, by default; rayjob.yaml is read from the folder of this script
#
# If the RayJob is already active, wait for it. If it has ended, create it again, which generates late rows only.
set -eu

now=$(date -u +%s)
date=${1:-$(date -u -d "@$((now - 86400))" +%F)}
name=pia-batch-$date

state() { kubectl get rayjob "$name" --ignore-not-found -o "jsonpath={.status.$1}"; }

case $(state jobDeploymentStatus) in
  Complete | Failed | ValidationFailed) kubectl delete rayjob "$name" --wait ;;
esac
if [ -z "$(kubectl get rayjob "$name" --ignore-not-found -o name)" ]; then
  sed "s/RUN_DATE/$date/" "$(dirname "$0")/rayjob.yaml" | kubectl create -f -
fi
# The RayJob is deleted with the Job that created it, so that the history limits of the CronJob hold for both.
if [ -n "${JOB_UID:-}" ]; then
  owner="{\"apiVersion\":\"batch/v1\",\"kind\":\"Job\",\"name\":\"$JOB_NAME\",\"uid\":\"$JOB_UID\"}"
  kubectl patch rayjob "$name" --type=merge -p "{\"metadata\":{\"ownerReferences\":[$owner]}}"
fi

while true; do
  case $(state jobDeploymentStatus) in
    Complete) exit 0 ;;
    Failed | ValidationFailed)
      echo "$name: $(state reason): $(state message)" >&2
      exit 3
      ;;
  esac
  sleep "${POLL_S:-30}"
done
