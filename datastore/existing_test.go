package datastore

import (
	"fmt"
	"slices"
	"testing"
)

func TestExisting(t *testing.T) {
	s, ctx := openStore(t), t.Context()
	for _, key := range []string{"/t/a.1", "/t/a.2", "/t/b.1", "/t/n150"} {
		if _, err := s.Create(ctx, key, []byte("value")); err != nil {
			t.Fatal(err)
		}
	}
	names := []string{"/t/b.1", "/t/none", "/t/a.*", "/t/c.*"}
	for i := range 200 { // more than fit into one transaction
		names = append(names, fmt.Sprintf("/t/n%d", i))
	}
	got, err := s.Existing(ctx, names...)
	if want := []string{"/t/b.1", "/t/a.1", "/t/a.2", "/t/n150"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v, expected %v", got, err, want)
	}
	if got, err := s.Existing(ctx); err != nil || len(got) != 0 {
		t.Errorf("nothing asked: %v, %v", got, err)
	}
}
