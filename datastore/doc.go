// Package datastore is Margay's only door to etcd: raw keys with compare-and-swap, watches, and the typed v3
// resources (IPPool, Node, BGPPeer, BGPConfiguration, ClusterInformation) in Calico's key layout and JSON, so that a
// store written by Calico can be read, and the other way round.
//
// Start reading at store.go (keys), then txn.go (all-or-nothing writes), watch.go, and resource.go for the resources.
// Everything read from etcd is untrusted: it ends in an error that names the key, never in a panic, and JSON fields
// that this version does not know survive a read, change and write.
//
// The embedded server lives in datastore/embedded, so that clients do not link it.
package datastore
