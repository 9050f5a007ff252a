#!/usr/bin/env bash
# Installs the system packages that the demo and the tests use, if any is missing. Needs root on Debian or Ubuntu.
set -euo pipefail

declare -A package=(
  [ip]=iproute2 [nft]=nftables [tcpdump]=tcpdump [tshark]=tshark [ping]=iputils-ping [bird]=bird2 [iperf3]=iperf3
  [jq]=jq [gcc]=gcc [zsh]=zsh [iptables]=iptables
)

PATH=$PATH:/usr/sbin:/sbin
missing=()
for tool in "${!package[@]}"; do
  command -v "$tool" >/dev/null 2>&1 || missing+=("${package[$tool]}")
done

if [ "$(id -u)" -ne 0 ]; then
  echo "setup: network namespaces and packages need root: run it with sudo" >&2
  exit 1
fi
if [ ! -c /dev/net/tun ]; then
  echo "setup: /dev/net/tun is missing, which the demo does without and the tests do not: load the tun module (modprobe tun)" \
    "or pass the device into this container" >&2
fi
if [ "${#missing[@]}" -gt 0 ]; then
  if ! command -v apt-get >/dev/null; then
    echo "setup: install these yourself, this is no Debian or Ubuntu: ${missing[*]}" >&2
    exit 1
  fi
  echo "setup: installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  log=$(mktemp)
  trap 'rm -f "$log"' EXIT
  # Debian starts the services of what it installs; a policy of its own keeps BIRD from running on this host.
  policy=/usr/sbin/policy-rc.d
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy"
    trap 'rm -f "$log" "$policy"' EXIT
  fi
  if ! { apt-get update -q && apt-get install -y -q --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "setup: apt-get failed; its last lines are above" >&2
    exit 1
  fi
fi
