package port_test

import (
	"bytes"
	"errors"
	"testing"

	"margay/vrouter"
	"margay/vrouter/port"
)

func TestMem(t *testing.T) {
	m := port.NewMem("mem", 3)
	batch := []*vrouter.Packet{vrouter.NewPacket(), vrouter.NewPacket()}
	for _, text := range []string{"one", "two", "three"} {
		m.Inject([]byte(text), vrouter.Offload{Size: uint16(len(text))})
	}
	var got [][]byte
	for _, want := range []int{2, 1} {
		n, err := m.Recv(batch)
		if n != want || err != nil {
			t.Fatalf("received %d, %v: expected %d", n, err, want)
		}
		for _, p := range batch[:n] {
			if int(p.Offload.Size) != p.Len || p.Off != vrouter.Headroom {
				t.Errorf("packet %+v", p.Offload)
			}
		}
		m.Send(batch[:n])
		got = append(got, m.Take()...)
	}
	if string(bytes.Join(got, []byte(" "))) != "one two three" || len(m.Take()) != 0 {
		t.Errorf("taken %q", got)
	}
	m.Stop()
	m.Stop()
	if _, err := m.Recv(batch); !errors.Is(err, vrouter.ErrStopped) {
		t.Errorf("after Stop: %v", err)
	}
}
