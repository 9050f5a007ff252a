// Package datastore is Margay's only door to etcd: raw keys with compare-and-swap, watches, and the typed v3
// resources in Calico's key layout and JSON, so that a store written by Calico can be read, and the other way round. The
// kinds that Margay acts on have types of their own; the others (policies, host endpoints, …) are a *Resource each.
//
// Start reading at store.go (keys), then txn.go (all-or-nothing writes), watch.go, resource.go for reading the
// resources and write.go for writing them, kinds.go for which there are, manifest.go for what users write.
// Everything read from etcd is untrusted: it ends in an error that names the key, never in a panic, and JSON fields
// that this version does not know survive a read, change and write.
//
// The embedded server lives in datastore/embedded, so that clients do not link it.
package datastore
