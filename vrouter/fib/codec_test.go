package fib

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"hash/crc32"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"pgregory.net/rapid"
)

func encode(t testing.TB, routes []Route) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Encode(&b, routes); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

var sample = []Route{
	drop("0.0.0.0/0"), local("10.244.0.0/26"), tunnel("10.244.0.64/26", "198.18.0.2"),
	{pfx("fd00::/64"), NextHop{Kind: KindDirect, Gateway: addr("fd01::2")}},
}

// The bytes on disk are a contract with older and newer versions.
func TestEncodedBytes(t *testing.T) {
	const want = "6d61726779666962" + "0001" + "00000004" + "0000003c" +
		"000400" + "00000000" +
		"01041a" + "0af40000" +
		"02041a" + "0af40040" + "c6120002" +
		"030640" + "fd000000000000000000000000000000" + "fd010000000000000000000000000002"
	got := encode(t, sample)
	if hex.EncodeToString(got[:len(got)-4]) != want {
		t.Errorf("got  %x\nwant %s", got[:len(got)-4], want)
	}
	if sum := crc32.ChecksumIEEE(got[:len(got)-4]); binary.BigEndian.Uint32(got[len(got)-4:]) != sum {
		t.Errorf("checksum %x, want %08x", got[len(got)-4:], sum)
	}
}

func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		routes := rapid.SliceOfN(rapid.Custom(genRoute), 0, 50).Draw(t, "routes")
		var b bytes.Buffer
		if err := Encode(&b, routes); err != nil {
			t.Fatal(err)
		}
		b.WriteString("next section")
		got, err := Decode(iotest.OneByteReader(&b))
		if err != nil || !slices.Equal(got, routes) {
			t.Fatalf("error %v\ngot  %v\nwant %v", err, got, routes)
		}
		if b.String() != "next section" {
			t.Fatalf("left %q to read", b.String())
		}
	})
}

func TestEncodeRefuses(t *testing.T) {
	var b bytes.Buffer
	err := Encode(&b, []Route{local("10.0.0.0/8"), {pfx("10.0.0.0/8"), NextHop{Kind: KindTunnel}}})
	if err == nil || !strings.Contains(err.Error(), "routes[1]") || b.Len() != 0 {
		t.Errorf("error %v, %d bytes written", err, b.Len())
	}
	failed := errors.New("disk full")
	if err := Encode(failingWriter{failed}, sample); !errors.Is(err, failed) {
		t.Errorf("error %v", err)
	}
}

type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

// Every way to cut the file short and every single flipped bit is found.
func TestDamageIsFound(t *testing.T) {
	good := encode(t, sample)
	for n := range good {
		if routes, err := Decode(bytes.NewReader(good[:n])); !errors.Is(err, ErrCorrupt) || routes != nil {
			t.Errorf("cut to %d of %d bytes: %v, %v", n, len(good), routes, err)
		}
	}
	for i := range len(good) * 8 {
		bad := bytes.Clone(good)
		bad[i/8] ^= 1 << (i % 8)
		if routes, err := Decode(bytes.NewReader(bad)); !errors.Is(err, ErrCorrupt) || routes != nil {
			t.Errorf("bit %d flipped: %v, %v", i, routes, err)
		}
	}
	if _, err := Decode(iotest.ErrReader(io.ErrClosedPipe)); !errors.Is(err, io.ErrClosedPipe) || errors.Is(err, ErrCorrupt) {
		t.Errorf("a reader's error became %v", err)
	}
}

// A file with groups has a version of its own.
func TestEncodedGroups(t *testing.T) {
	const want = "6d61726779666962" + "0002" + "00000001" + "00000014" +
		"82041a" + "0af40040" + "c6120002" + "02" + "c6120003" + "c6120004"
	got := encode(t, []Route{{pfx("10.244.0.64/26"), Multipath(KindTunnel, addr("198.18.0.4"), addr("198.18.0.2"), addr("198.18.0.3"))}})
	if hex.EncodeToString(got[:len(got)-4]) != want {
		t.Errorf("got  %x\nwant %s", got[:len(got)-4], want)
	}
}

// seal gives b a right checksum, so that what it says is what is tested.
func seal(b []byte) []byte {
	return binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b))
}

func snapshotOf(version uint16, count uint32, payload []byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte(codecMagic), version)
	b = binary.BigEndian.AppendUint32(b, count)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return seal(append(b, payload...))
}

func TestDecodeRefuses(t *testing.T) {
	route := []byte{1, 4, 8, 10, 0, 0, 0}
	group := []byte{0x82, 4, 8, 10, 0, 0, 0, 198, 18, 0, 1, 1, 198, 18, 0, 2}
	huge := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16([]byte(codecMagic), 1), 1<<32-1)
	for _, c := range []struct {
		name string
		file []byte
		want string
	}{
		{"text", []byte("this is not a snapshot at all"), "magic"},
		{"a newer version", snapshotOf(3, 1, route), "version: 3"},
		{"groups promised and not there", snapshotOf(2, 1, route), "want what version 2 says"},
		{"a group that was not promised", snapshotOf(1, 1, group), "want what version 1 says"},
		{"a group of a local route", snapshotOf(2, 1, []byte{0x81, 4, 8, 10, 0, 0, 0}), "kind"},
		{"a group of one", snapshotOf(2, 1, append(group[:11:11], 0)), "cut short"},
		{"a group cut short", snapshotOf(2, 1, group[:len(group)-1]), "cut short"},
		{"a group that is not sorted", snapshotOf(2, 1, append(group[:12:12], 198, 18, 0, 1)), "sorted"},
		{"count too high for the length", snapshotOf(1, 2, route), "length"},
		{"count too low", snapshotOf(1, 1, append(slices.Clone(route), route...)), "7 bytes behind"},
		{"a length of 4 GiB", binary.BigEndian.AppendUint32(huge, 1<<32-1), "length"},
		{"a length of 512 MiB, and no bytes", append([]byte(codecMagic), 0, 1, 0, 0, 0, 1, 0x20, 0, 0, 0), "cut short"},
		{"a family of 5", snapshotOf(1, 1, []byte{1, 5, 8, 10, 0, 0, 0}), "family"},
		{"a kind of 9", snapshotOf(1, 1, []byte{9, 4, 8, 10, 0, 0, 0}), "kind"},
		{"a prefix length of 33", snapshotOf(1, 1, []byte{1, 4, 33, 10, 0, 0, 0}), "prefix"},
		{"bits beyond the prefix", snapshotOf(1, 1, []byte{1, 4, 8, 10, 0, 0, 1}), "want 10.0.0.0/8"},
		{"an IPv6 route of 7 bytes", snapshotOf(1, 1, []byte{1, 6, 8, 0xfd, 0, 0, 0}), "cut short"},
		{"a tunnel without gateway", snapshotOf(1, 1, []byte{2, 4, 8, 10, 0, 0, 0}), "cut short"},
		{"a tunnel to 0.0.0.0", snapshotOf(1, 1, []byte{2, 4, 8, 10, 0, 0, 0, 0, 0, 0, 0}), "unicast"},
	} {
		routes, err := Decode(bytes.NewReader(c.file))
		if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), c.want) || routes != nil {
			t.Errorf("%s: %v, error %v, want one with %q", c.name, routes, err, c.want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(nil), false)
	f.Add(encode(f, nil), false)
	f.Add(encode(f, sample), false)
	f.Add(snapshotOf(1, 1, []byte{2, 4, 8, 10, 0, 0, 0, 198, 18, 0, 1}), true)
	f.Add(snapshotOf(2, 1, []byte{0x82, 4, 8, 10, 0, 0, 0, 198, 18, 0, 1, 1, 198, 18, 0, 2}), true)
	f.Add(snapshotOf(1, 1, append([]byte{1, 6, 96, 15: 0}, 0xff, 0xff, 0, 0)), true)
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if fix && len(b) >= headerLen+4 { // a fuzzer cannot guess a length and a checksum
			binary.BigEndian.PutUint32(b[headerLen-4:], uint32(len(b)-headerLen-4))
			b = seal(b[: len(b)-4 : len(b)-4])
		}
		r := bytes.NewReader(b)
		routes, err := Decode(r)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) || routes != nil {
				t.Fatalf("%v with %d routes", err, len(routes))
			}
			return
		}
		if err := New().Update(routes, nil); err != nil {
			t.Fatalf("decoded what the table refuses: %v", err)
		}
		if again := encode(t, routes); !bytes.Equal(again, b[:len(b)-r.Len()]) {
			t.Fatalf("encoded again\n%x\nnot\n%x", again, b)
		}
	})
}
