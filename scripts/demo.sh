#!/usr/bin/env bash
# The main job on real traffic: three nodes with two pods each, in network namespaces of this machine. Every packet
# line below is captured while the demo runs. `make demo` builds first; this script needs bin/.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
PATH=$here/bin:$PATH:/usr/sbin:/sbin
lab=demo-$$
tmp=$(mktemp -d)
started=$SECONDS

bold=$'\e[1m' dim=$'\e[2m' green=$'\e[32m' red=$'\e[31m' off=$'\e[0m'
[ -t 1 ] || bold='' dim='' green='' red='' off=''

pids=()
up=''
cleanup() {
  local rc=$?
  trap - EXIT INT TERM
  for p in "${pids[@]:-}"; do [ -n "$p" ] && kill "$p" 2>/dev/null || true; done
  # A lab that did not come up has removed itself.
  margayctl lab down --name "$lab" >"$tmp/down" 2>&1 || [ -z "$up" ] || { [ "$rc" -ne 0 ] || rc=1; cat "$tmp/down" >&2; }
  rm -rf "$tmp"
  exit "$rc"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

title() { printf '\n%s%s%s\n' "$bold" "$*" "$off"; }
say() { printf '  %s\n' "$*"; }
fail() { printf '%sdemo: %s%s\n' "$red" "$*" "$off" >&2; exit 1; }
ok() { printf '  %s✓%s %s\n' "$green" "$off" "$*"; }

# until_true SECONDS WHAT COMMAND…: polls until the command succeeds.
until_true() {
  local limit=$1 what=$2 end
  shift 2
  end=$((SECONDS + limit))
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$end" ] || fail "$what: not within $limit s"
    read -rt 0.1 <> <(:) || true
  done
}

status() { margayctl lab status --name "$lab" -o json; }
node() { ip netns exec "$lab-$1" "${@:2}"; }
address() { status | jq -r --arg p "$1" '.nodes[].pods[] | select(.name | endswith($p)) | .address'; }
node_address() { status | jq -r --arg n "$lab-$1" '.nodes[] | select(.name == $n) | .address'; }
host_side() { node "$1" ip -o route get "$2" | grep -oE 'cali[0-9a-f]+' | head -n 1; }

# capture NAME NODE INTERFACE FILTER: one packet, in the background; hop prints it.
capture() {
  node "$2" tcpdump -i "$3" -n -v -l -c 1 --immediate-mode "$4" >"$tmp/$1" 2>"$tmp/$1.err" &
  pids+=($!)
  until_true 10 "tcpdump on $2 $3" grep -q 'listening on' "$tmp/$1.err"
}
hop() {
  until_true 5 "a packet at $1" test -s "$tmp/$1"
  printf '    %-37s %s%s%s\n' "$2" "$dim" "$(tr -s '\n\t ' ' ' <"$tmp/$1" | sed -E 's/^[0-9:.]+ //; s/, length [0-9]+ *$//; s/flags/flags/')" "$off"
  cat "$tmp/$1" >>"$tmp/log"
}
ping_once() { margayctl lab exec --name "$lab" "$1" -- ping -n -c 1 -W 2 "$2" >/dev/null || fail "$1 does not reach $2"; }

title "1. A cluster: three nodes with two pods each, an underlay between them, one etcd"
margayctl lab up --name "$lab" --nodes 3 --pods 2
up=yes
a=$(address node1-pod1) b=$(address node1-pod2) c=$(address node2-pod1)
n1=$(node_address node1) n2=$(node_address node2)
cali_a=$(host_side node1 "$a") cali_b=$(host_side node1 "$b") cali_c=$(host_side node2 "$c")
[ -n "$a" ] && [ -n "$b" ] && [ -n "$c" ] && [ -n "$cali_a" ] && [ -n "$cali_b" ] && [ -n "$cali_c" ] || fail "lab status names no addresses"

title "2. Same node: Pod A eth0 → caliA → host routing → caliB → Pod B eth0"
capture s1 node1 "$cali_a" "icmp[icmptype] == icmp-echo"
capture s2 node1 "$cali_b" "icmp[icmptype] == icmp-echo"
ping_once node1-pod1 "$b"
hop s1 "node1 $cali_a"
hop s2 "node1 $cali_b"

title "3. Other node, IP-in-IP: Pod → caliXXXX → vr0 (the vRouter encapsulates) → underlay → other node"
capture e1 node1 "$cali_a" "icmp[icmptype] == icmp-echo"
capture e2 node1 vr0 "icmp[icmptype] == icmp-echo"
capture e3 node1 eth0 "ip proto 4 and src host $n1"
capture e4 node2 vr0 "icmp[icmptype] == icmp-echo"
capture e5 node2 "$cali_c" "icmp[icmptype] == icmp-echo"
ping_once node1-pod1 "$c"
hop e1 "node1 $cali_a"
hop e2 "node1 vr0"
hop e3 "underlay, node1 eth0 (outer + inner)"
hop e4 "node2 vr0"
hop e5 "node2 $cali_c"
grep -q "$n1 > $n2" "$tmp/e3" && grep -q 'proto IPIP (4)' "$tmp/e3" && grep -q "$a > $c" "$tmp/e3" || fail "the underlay packet is not IP-in-IP"

rate() { jq -r "(.end.sum_received.bits_per_second / 1e9 * 100 | round / 100 | tostring) + \" Gbit/s over \" + (.end.sum_received.seconds | floor | tostring) + \" s\"" "$1"; }
transfer() {
  margayctl lab exec --name "$lab" node2-pod1 -- iperf3 -s -1 --forceflush >"$tmp/server" 2>&1 &
  pids+=($!)
  until_true 10 "iperf3's server" grep -q 'Server listening' "$tmp/server"
  margayctl lab exec --name "$lab" node1-pod1 -- iperf3 -c "$c" -t 3 -J >"$tmp/iperf.json" || fail "iperf3: $(jq -r .error "$tmp/iperf.json")"
  ok "TCP, $1: $(rate "$tmp/iperf.json")"
}
transfer "$a → $c through both vRouters"

title "4. Other node, unencapsulated: the pool's ipipMode becomes CrossSubnet, and the nodes share a subnet"
eval "$(margayctl lab env --name "$lab")"
export DATASTORE_TYPE ETCD_ENDPOINTS
margayctl patch ippool default-ipv4-ippool -p '{"spec":{"ipipMode":"CrossSubnet"}}' | sed 's/^/  /'
direct() { node "$1" ip route get "$2" | grep -q "via $3 dev eth0"; }
until_true 10 "node1's kernel route" direct node1 "$c" "$n2"
until_true 10 "node2's kernel route" direct node2 "$a" "$n1"
say "node1: $(node node1 ip route get "$c" | head -n 1)   ${dim}(what BGP told it)${off}"
capture d1 node1 "$cali_a" "icmp[icmptype] == icmp-echo"
capture d2 node1 eth0 "icmp[icmptype] == icmp-echo or ip proto 4"
capture d3 node2 "$cali_c" "icmp[icmptype] == icmp-echo"
ping_once node1-pod1 "$c"
hop d1 "node1 $cali_a"
hop d2 "underlay, node1 eth0"
hop d3 "node2 $cali_c"
! grep -q 'proto IPIP' "$tmp/d2" || fail "encapsulated although the pool says CrossSubnet"
transfer "$a → $c by the kernel alone"
margayctl patch ippool default-ipv4-ippool -p '{"spec":{"ipipMode":"Always"}}' >/dev/null
tunnelled() { node "$1" ip route get "$2" | grep -q 'dev vr0'; }
until_true 10 "node1's route back to vr0" tunnelled node1 "$c"
until_true 10 "node2's route back to vr0" tunnelled node2 "$a"

title "5. BGP, as node1 sees it"
node node1 margayctl node status | sed 's/^/  /'

title "6. Addresses: the pool and the nodes' blocks, in etcd"
margayctl ipam show --show-blocks | sed 's/^/  /'

title "7. A control plane that dies is not missed: node2's agent is killed with -9"
agent=$(status | jq -r --arg n "$lab-node2" '.nodes[] | select(.name == $n) | .pids.agent')
kill -9 "$agent"
margayctl lab exec --name "$lab" node1-pod1 -- ping -n -i 0.01 -c 200 -W 2 "$c" >"$tmp/ping" || fail "packets were lost without the agent"
ok "$(grep 'packets transmitted' "$tmp/ping")"
margayctl lab restart --name "$lab" node2 agent

title "8. A node that goes away and comes back"
block=$(node node1 margayctl node routes -o json | jq -r --arg n "$n2" '[.routes[] | select(.gateway == $n)][0].prefix')
known() { node "$1" margayctl node routes -o json | jq -e --arg p "$block" '.routes[] | select(.prefix == $p)' >/dev/null; }
unknown() { ! known "$1"; }
began=$(date +%s%N)
margayctl lab stop --name "$lab" node2
until_true 5 "node1 loses $block" unknown node1
until_true 5 "node3 loses $block" unknown node3
ok "$(((${EPOCHREALTIME/./} * 1000 - began) / 1000000)) ms after the stop began, node1 and node3 have lost $block"
node node1 margayctl node status | grep -E "PEER ADDRESS|$n2" | sed 's/^/  /'
began=$(date +%s%N)
margayctl lab start --name "$lab" node2
until_true 30 "node1 learns $block again" known node1
until_true 30 "node1-pod1 reaches $c again" margayctl lab exec --name "$lab" node1-pod1 -- ping -n -c 1 -W 1 "$c"
ok "$(((${EPOCHREALTIME/./} * 1000 - began) / 1000000)) ms after the start began, $block is back and $c, which kept its address, answers"

title "Done in $((SECONDS - started)) s; the lab is being taken down."
