package ipam

import (
	"errors"
	"testing"

	"margay/datastore"
)

// A pool comes back with blocks of another size, above or below those that are there: an address that is held is not given
// to whoever asks for it, and a free one only out of the block it lies in.
func TestFixedAddressInABlockOfAnotherSize(t *testing.T) {
	for _, tt := range []struct {
		cidr      string
		was, will int
		free      string
	}{{"10.244.0.0/16", 26, 28, "10.244.0.1"}, {"10.244.0.0/16", 28, 24, "10.244.0.200"}, {"fd00::/64", 122, 124, "fd00::1"}, {"fd00::/64", 124, 120, "fd00::f0"}} {
		sized := func(bits int) *datastore.IPPool {
			return pool("p", tt.cidr, func(s *datastore.IPPoolSpec) { s.BlockSize = bits })
		}
		ask := func(ip string) Request {
			if r := (Request{Handle: "net." + ip, IPv4: Ask{IP: addr(ip)}}); addr(ip).Is4() {
				return r
			}
			return Request{Handle: "net." + ip, IPv6: Ask{IP: addr(ip)}}
		}
		s, ctx := openStore(t, sized(tt.was)), t.Context()
		held := prefix(tt.cidr).Addr().String()
		if _, err := New(s, "n1", nil).AssignAll(ctx, ask(held)); err != nil {
			t.Fatal(err)
		}
		if err := datastore.DeleteResource[datastore.IPPool](ctx, s, "p"); err != nil {
			t.Fatal(err)
		}
		if err := datastore.CreateResource(ctx, s, sized(tt.will)); err != nil {
			t.Fatal(err)
		}
		for _, node := range []string{"n1", "n2"} {
			again := ask(held)
			again.Handle = "net.other"
			if got, err := New(s, node, nil).AssignAll(ctx, again); !errors.Is(err, ErrAddressInUse) {
				t.Errorf("%s, /%d then /%d: %s got %+v, %v", tt.cidr, tt.was, tt.will, node, got, err)
			}
			free := ask(tt.free)
			free.Handle += "." + node
			_, err := New(s, node, nil).AssignAll(ctx, free)
			if err != nil && !errors.Is(err, ErrAddressInUse) {
				t.Errorf("%s, /%d then /%d: %s: free address: %v", tt.cidr, tt.was, tt.will, node, err)
			}
		}
		clean(t, s)
	}
}
