package filter

import (
	"strings"
	"testing"
)

func TestRefused(t *testing.T) {
	for text, want := range map[string]string{
		"port":                           "the end: expected a port",
		"port http":                      `"http" at character 6: expected a port`,
		"port 70000":                     "expected a port",
		"port 80-90":                     "a range is portrange 80-90",
		"host example.org":               "names are not looked up",
		"host 10.0.0.300":                "expected an IPv4 or IPv6 address",
		"net 10.0.0.1/24":                "expected 10.0.0.0/24",
		"net 10.0.0.0":                   "expected ADDRESS/LENGTH",
		"tcp host 10.0.0.1":              "tcp does not go with host",
		"ip host ::1":                    "expected an address of ip",
		"ip port 80":                     "ip has no ports",
		"src proto 4":                    "src and dst do not go with proto",
		"frobnicate":                     `"frobnicate" at character 1`,
		"tcp and":                        "the end: expected a test",
		"tcp or or udp":                  `"or" at character 8`,
		"(tcp":                           "expected )",
		"tcp)":                           "expected and, or, or the end",
		"tcp[13":                         "expected ]",
		"tcp[13:3] = 1":                  "expected a size of 1, 2 or 4",
		"tcp[13] & 2":                    "expected one of = !=",
		"ether[0] = 1":                   "expected ip, ip6",
		"less x":                         "expected a number",
		"host 10.0.0.1 \x01":             "printable ASCII",
		strings.Repeat("(", 200) + "tcp": "nested deeper than 100",
		strings.Repeat("a", MaxText+1):   "expected at most 4096",
		"proto 256":                      "expected a protocol number",
	} {
		f, err := Parse(text)
		if err == nil {
			t.Errorf("%q was accepted as %v", text, f)
		} else if !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v: expected %q in it", text, err, want)
		}
	}
}

func TestNoFilterAcceptsEverything(t *testing.T) {
	f, err := Parse("  ")
	if err != nil || !f.Match(nil, 0) || !(*Filter)(nil).Match([]byte{1}, 1) {
		t.Errorf("%v, %v", f, err)
	}
}

func TestMatchDoesNotAllocate(t *testing.T) {
	f, err := Parse("tcp port 80 and (host 10.244.1.5 or net 10.0.0.0/8) and not tcp[tcpflags] & (tcp-syn|tcp-fin) != 0 and less 9000")
	if err != nil {
		t.Fatal(err)
	}
	b := samplePackets(1)[0]
	if n := testing.AllocsPerRun(100, func() { f.Match(b, len(b)) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzFilter: no text and no packet leads further than to an error or an answer.
func FuzzFilter(f *testing.F) {
	for _, e := range expressions {
		f.Add(e, samplePackets(1)[0])
	}
	f.Add("tcp[0:4] & 0xffffffff >= 1 or len = 3", []byte{0x4f})
	f.Add("not not !(src ::1 and 2)", []byte{0x60})
	f.Fuzz(func(t *testing.T, text string, b []byte) {
		filter, err := Parse(text)
		if err != nil {
			if filter != nil || !strings.HasPrefix(err.Error(), "filter: ") {
				t.Fatalf("%v, %v", filter, err)
			}
			return
		}
		filter.Match(b, len(b))
	})
}
