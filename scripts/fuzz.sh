#!/usr/bin/env bash
# Runs every native fuzz target of the module, one after the other, for the time given (30s).
set -euo pipefail
time=${1:-30s}
count=0
while read -r pkg dir; do
  for target in $(cat "$dir"/*_test.go 2>/dev/null | sed -nE 's/^func (Fuzz[A-Za-z0-9_]+)\(.*/\1/p'); do
    echo "fuzz: $pkg $target for $time"
    go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" "$pkg"
    count=$((count + 1))
  done
done < <(go list -f '{{.ImportPath}} {{.Dir}}' ./...)
echo "fuzz: $count targets, no finding"
[ "$count" -gt 0 ]
