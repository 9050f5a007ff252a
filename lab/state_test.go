package lab

import (
	"sync"
	"testing"
)

func TestUpdatesByManyAreKept(t *testing.T) {
	l, _ := wired(t, testHost(t), 1, 0)
	const writers = 20
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			if err := l.update(func(s *state) error { s.Nodes[0].NextPod++; return nil }); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if s, err := l.load(); err != nil || s.Nodes[0].NextPod != 1+writers {
		t.Errorf("%+v, %v", s, err)
	}
}
