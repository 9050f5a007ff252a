// Package lab builds whole Margay clusters on one machine out of network namespaces: nodes, their pods, an underlay
// between the nodes, etcd, and on every node the real daemons. Pods are attached by executing margay-cni as a
// container runtime does.
//
// A lab NAME owns, and Down removes, exactly this:
//   - the named namespaces NAME-underlay, NAME-node<i> and NAME-node<i>-pod<j> (see names.go), so that
//     `ip netns exec` enters them;
//   - one veth pair between the host and the underlay's bridge br0;
//   - the directory DIR/NAME with lab.json, etcd's data, and each node's sockets, state and logs;
//   - the processes listed in lab.json, and whatever else runs in its namespaces.
//
// Where to start reading: Up in up.go is the life of a lab from first to last, Down in down.go its end. netns.go and
// proc.go are the two kernel objects everything is made of; state.go is what is written down about them.
package lab
