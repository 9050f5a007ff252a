package port_test

import (
	"strings"
	"testing"
	"time"

	"margay/vrouter/port"
)

// TestSpinner: a wait begins with looking exactly when the one before was short.
func TestSpinner(t *testing.T) {
	var never port.Spinner
	for range 2 {
		if never.Again() {
			t.Error("the zero value looks twice")
		}
	}
	s := port.NewSpinner(time.Minute)
	if s.Again() {
		t.Error("the first wait begins with looking")
	}
	s.Found()
	if !s.Looks() {
		t.Error("a wait after a short one begins with sleeping")
	}
	// What comes after a longer time than this, however short, comes late.
	s.SetLongest(time.Nanosecond)
	for s.Again() {
	}
	s.Found()
	if s.Looks() || s.Again() {
		t.Error("a wait after a long one begins with looking")
	}
}

func TestParseCPUs(t *testing.T) {
	if cpus, err := port.ParseCPUs(""); err != nil || cpus != nil {
		t.Errorf("none: %v, %v", cpus, err)
	}
	if cpus, err := port.ParseCPUs("0,0-0"); err != nil || len(cpus) != 2 {
		t.Errorf("twice the first: %v, %v", cpus, err)
	}
	for list, want := range map[string]string{
		"x": "expected numbers of CPUs", "1-": "expected numbers", "3-2": "expected numbers", "-1": "expected numbers", "0,": "expected numbers",
		"1024": "expected numbers", "1023": "may not use CPU 1023",
	} {
		if cpus, err := port.ParseCPUs(list); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, %v: expected %q", list, cpus, err, want)
		}
	}
}
