package agent

import "margay/check"

// logChecks says what on this node may keep Margay from working: what `margayctl node checksystem` finds.
func (a *Agent) logChecks() {
	a.mu.Lock()
	underlay := a.underlay.Interface
	a.mu.Unlock()
	for _, r := range check.Host(check.Options{Underlay: underlay, Tunnel: tunnelDevice, Agent: true}) {
		switch r.Status {
		case check.Fail:
			a.log.Error("this node is not as it should be", "check", r.Name, "found", r.Found, "do", r.Do)
		case check.Warn:
			a.log.Warn("this node may not be as it should be", "check", r.Name, "found", r.Found, "do", r.Do)
		}
	}
}
