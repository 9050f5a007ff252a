package ctl

import "testing"

const v1 = `apiVersion: v1
kind: ipPool
metadata: {cidr: 10.1.0.0/16}
spec:
  ipip: {enabled: true, mode: cross-subnet}
  nat-outgoing: true
---
- apiVersion: v1
  kind: bgpPeer
  metadata: {scope: node, node: Node_1, peerIP: 192.0.2.9}
  spec: {asNumber: 64513}
- apiVersion: v1
  kind: bgpPeer
  metadata: {scope: global, peerIP: "2001:db8::9"}
  spec: {asNumber: "1.10"}
---
apiVersion: v1
kind: node
metadata: {name: Node_1}
spec: {bgp: {ipv4Address: 192.0.2.1/24, asNumber: 64514}, orchRefs: [{orchestrator: k8s, nodeName: n1}]}
`

const v3 = `apiVersion: v1
items:
- apiVersion: projectcalico.org/v3
  kind: IPPool
  metadata:
    creationTimestamp: null
    name: 10-1-0-0-16
  spec:
    allowedUses:
    - Workload
    - Tunnel
    assignmentMode: Automatic
    blockSize: 26
    cidr: 10.1.0.0/16
    ipipMode: CrossSubnet
    natOutgoing: true
    nodeSelector: all()
    vxlanMode: Never
- apiVersion: projectcalico.org/v3
  kind: BGPPeer
  metadata:
    creationTimestamp: null
    name: node-1.192-0-2-9
  spec:
    asNumber: 64513
    node: node-1
    peerIP: 192.0.2.9
- apiVersion: projectcalico.org/v3
  kind: BGPPeer
  metadata:
    creationTimestamp: null
    name: 2001-0db8-0000-0000-0000-0000-0000-0009
  spec:
    asNumber: 65546
    peerIP: 2001:db8::9
- apiVersion: projectcalico.org/v3
  kind: Node
  metadata:
    creationTimestamp: null
    name: node-1
  spec:
    bgp:
      asNumber: 64514
      ipv4Address: 192.0.2.1/24
    orchRefs:
    - nodeName: n1
      orchestrator: k8s
  status: {}
kind: List
metadata: {}
`

func TestConvert(t *testing.T) {
	openStore(t)
	doc := func(kind, metadata, spec string) string {
		return "apiVersion: v1\nkind: " + kind + "\nmetadata: " + metadata + "\nspec: " + spec + "\n"
	}
	const failed = "failed to execute command: -: document 1: "
	play(t, t.TempDir(), []step{
		{args: "convert -f -", stdin: v1, out: v3},
		{args: "apply -f -", stdin: v3, out: "Successfully applied 4 resource(s)\n"},
		{args: "convert -f - -o json", stdin: doc("node", "{name: n1}", "{}"), out: "{\n  \"kind\": \"Node\",\n  \"apiVersion\": \"projectcalico.org/v3\",\n  \"metadata\": {\n    \"name\": \"n1\",\n    \"creationTimestamp\": null\n  },\n  \"spec\": {},\n  \"status\": {}\n}\n"},
		{args: "convert -f -", stdin: doc("ipPool", "{cidr: 10.1.0.0}", "{}"), err: failed + `ipPool: metadata.cidr "10.1.0.0": expected a prefix such as 10.244.0.0/16`},
		{args: "convert -f -", stdin: doc("ipPool", "{cidr: 10.1.0.0/16}", "{ipip: {mode: never}}"), err: failed + `ipPool: spec.ipip.mode "never": expected always or cross-subnet`},
		{args: "convert -f -", stdin: doc("ipPool", "{cidr: 10.1.0.0/16}", "{natOutgoing: true}"), err: failed + `ipPool: unknown field "natOutgoing"`},
		{args: "convert -f -", stdin: doc("ipPool", "{cidr: 10.1.0.0/16}", "{disabled: maybe}"), err: failed + `ipPool: spec.disabled: expected true or false, got text`},
		{args: "convert -f -", stdin: doc("bgpPeer", "{scope: global, node: n1, peerIP: 192.0.2.9}", "{asNumber: 1}"), err: failed + `bgpPeer: metadata.scope "global" and metadata.node "n1": expected scope global without a node, or scope node with one`},
		{args: "convert -f -", stdin: doc("bgpPeer", "{scope: global, peerIP: x}", "{asNumber: 1}"), err: failed + `bgpPeer: metadata.peerIP "x": expected an address`},
		{args: "convert -f -", stdin: doc("node", "{name: n1}", "{bgp: {}}"), err: failed + `node: spec.bgp: expected ipv4Address, ipv6Address or both`},
		{args: "convert -f -", stdin: doc("policy", "{name: p}", "{}"), err: failed + `kind "policy": expected ipPool, bgpPeer or node`},
		{args: "convert -f -", stdin: pool("p", "10.1.0.0/16", ""), err: failed + `IPPool: apiVersion "projectcalico.org/v3": expected v1, the version that is converted`},
		{args: "convert -f -", stdin: "[[]]", err: failed + "[0]: expected a resource, not a list"},
		{args: "convert -f -", stdin: "# nothing", err: "no resources specified in file -"},
		{args: "convert -f {dir}/none", err: "failed to execute command: stat {dir}/none: no such file or directory"},
		{args: "convert -f - -o xml", err: `--output "xml": expected one of [yaml json]`},
	})
}
