package lab

import (
	"crypto/sha1"
	"encoding/hex"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
)

// DefaultName is the lab meant where none is named.
const DefaultName = "lab"

// maxName bounds a lab's name: a socket below its directory must fit the 108 bytes of a unix address.
const maxName = 24

// Limits of a lab. The underlay is a /24 whose last addresses belong to the host and to etcd.
const (
	MaxNodes   = 250
	MaxPods    = 250
	MaxQueues  = 256   // of a vrouter, which says which the machine can have
	MinMTU     = 576   // bytes: what every IPv4 host accepts (RFC 791)
	MaxMTU     = 65535 // bytes: veth's upper bound
	DefaultMTU = 1500  // bytes
)

// hostOctet and etcdOctet are the underlay addresses of the host's veth and of the bridge, where etcd listens.
const (
	hostOctet = 253
	etcdOctet = 254
	etcdPort  = 2379
)

var nameForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`)

// CheckName refuses what cannot name a lab.
func CheckName(name string) error {
	if !nameForm.MatchString(name) || len(name) > maxName {
		return fmt.Errorf("lab name %q: expected at most %d of a-z, 0-9 and -, beginning and ending with a letter or digit",
			name, maxName)
	}
	return nil
}

// nodeName is both the node's name in the datastore and its namespace.
func nodeName(lab string, i int) string { return lab + "-node" + strconv.Itoa(i) }

func podName(node string, i int) string { return node + "-pod" + strconv.Itoa(i) }

func underlayName(lab string) string { return lab + "-underlay" }

// namespaceForm matches the namespaces of one lab and of no other: no lab name ends in what it requires after NAME-,
// so a lab "a" and a lab "a-node1" stay apart.
func namespaceForm(lab string) *regexp.Regexp {
	return regexp.MustCompile(`^` + regexp.QuoteMeta(lab) + `-(underlay|node[0-9]+(-pod[0-9]+)?)$`)
}

// hostLink names the host's end of the veth into the lab's underlay; IFNAMSIZ leaves room for a hash only.
func hostLink(lab string) string {
	sum := sha1.Sum([]byte(lab))
	return "mg" + hex.EncodeToString(sum[:])[:11]
}

// subnetOf returns the underlay 198.18.k.0/24, of the range set aside for benchmarks (RFC 2544, appendix C.2.2).
func subnetOf(k int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 18, byte(k), 0}), 24)
}

// at returns the address of the subnet whose last octet is n.
func at(subnet netip.Prefix, n int) netip.Addr {
	a := subnet.Addr().As4()
	a[3] = byte(n)
	return netip.AddrFrom4(a)
}
