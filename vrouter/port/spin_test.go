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
	s.Found(1)
	if !s.Looks() {
		t.Error("a wait after a short one begins with sleeping")
	}
	// What comes after a longer time than this, however short, comes late.
	s.SetLongest(time.Nanosecond)
	for s.Again() {
	}
	s.Found(1)
	if s.Looks() || s.Again() {
		t.Error("a wait after a long one begins with looking")
	}
}

// TestSpinnerStream: where packets come one after the other a wait is for sleeping, and for looking again once they come singly.
func TestSpinnerStream(t *testing.T) {
	const many = 1_000_000 // within less than the ten seconds that make them no stream
	s := port.NewSpinner(time.Minute)
	s.Again()
	s.Found(many)
	if s.Again() {
		t.Error("looks for more of a stream")
	}
	s.Found(1)
	for began := time.Now(); time.Since(began) < time.Millisecond; {
	}
	if !s.Again() {
		t.Error("does not look after a packet that came singly")
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
