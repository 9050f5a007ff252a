#!/usr/bin/env bash
# Runs every native fuzz target of the module, one after the other, for the time given (30s), and closes with a table of
# them. A finding does not keep the others from running; what was found is in the target's testdata then.
set -euo pipefail
time=${1:-30s}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
rows=() found=0
while read -r pkg dir; do
  for target in $(cat "$dir"/*_test.go 2>/dev/null | sed -nE 's/^func (Fuzz[A-Za-z0-9_]+)\(.*/\1/p'); do
    echo "fuzz: $pkg $target for $time"
    result=ok
    # Without a limit an input whose coverage varies is made smaller for a minute: all the time there is.
    go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 100x "$pkg" 2>&1 | tee "$log" || result=FOUND found=$((found + 1))
    execs=$(sed -nE 's/.*execs: ([0-9]+).*/\1/p' "$log" | tail -n 1)
    rows+=("$(printf '%-28s %-28s %12s  %s' "${pkg#*/}" "$target" "${execs:--}" "$result")")
  done
done < <(go list -f '{{.ImportPath}} {{.Dir}}' ./...)
if [ ${#rows[@]} = 0 ]; then
  echo "fuzz: no targets" >&2
  exit 1
fi
printf '\n%-28s %-28s %12s  %s\n' PACKAGE TARGET EXECUTIONS RESULT
printf '%s\n' "${rows[@]}"
echo "fuzz: ${#rows[@]} targets, $time each, $found with findings"
[ "$found" = 0 ]
