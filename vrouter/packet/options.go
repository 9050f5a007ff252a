package packet

// Options of an IPv4 header, RFC 791 section 3.1.
const (
	optionEnd          = 0
	optionNop          = 1
	optionRecordRoute  = 0x07
	optionTimestamp    = 0x44
	optionLooseRoute   = 0x83
	optionRouterAlert  = 0x94
	optionStrictRoute  = 0x89
	optionCopied       = 0x80 // this bit: into every fragment
	timestampAndAddr   = 1
	timestampPrespec   = 3
	minRoutePointer    = 4 // the lowest value that the pointer of a route option may have
	minTimestampOffset = 5
)

// CheckOptions looks at the options of p, a view as ParseIPv4 returns it. FaultOptions says that one of them is
// malformed, and at is then where, in bytes from the start of the header, as the pointer of a "parameter problem" wants
// it (RFC 792). FaultSourceRoute says that p asks to be sent by way of others, which is refused: RFC 7126 sections 4.3.5
// and 4.4.5. Everything else passes unchanged, unknown options included (RFC 1812 section 5.2.4.1).
func CheckOptions(p IPv4) (at int, fault Fault) {
	sourceRoute, seen := false, [2]bool{}
	end := p.HeaderLen()
	for i := IPv4MinLen; i < end; {
		switch p[i] {
		case optionEnd:
			i = end
			continue
		case optionNop:
			i++
			continue
		}
		if i+2 > end {
			return i, FaultOptions
		}
		n := int(p[i+1])
		if n < 2 || i+n > end {
			return i, FaultOptions
		}
		option := p[i : i+n]
		wrong := -1
		switch option[0] {
		case optionLooseRoute, optionStrictRoute:
			if wrong = checkRoute(option); wrong < 0 && sourceRoute {
				wrong = 0
			}
			sourceRoute = true
		case optionRecordRoute:
			if wrong = 0; !seen[0] {
				wrong = checkRoute(option)
				if wrong < 0 && int(option[2]) <= n && int(option[2])+3 > n {
					wrong = 2
				}
			}
			seen[0] = true
		case optionTimestamp:
			if wrong = 0; !seen[1] {
				wrong = checkTimestamp(option)
			}
			seen[1] = true
		case optionRouterAlert:
			if n < 4 {
				wrong = 1
			}
		}
		if wrong >= 0 {
			return i + wrong, FaultOptions
		}
		i += n
	}
	if sourceRoute {
		return 0, FaultSourceRoute
	}
	return 0, FaultNone
}

// checkRoute returns which byte of a route option is wrong, -1 if none.
func checkRoute(option []byte) int {
	switch {
	case len(option) < 3:
		return 1
	case option[2] < minRoutePointer:
		return 2
	}
	return -1
}

// checkTimestamp returns which byte of a timestamp option is wrong, -1 if none. A full one whose overflow count is full
// too is an error by RFC 791.
func checkTimestamp(option []byte) int {
	if len(option) < 4 {
		return 1
	}
	pointer, flag := int(option[2]), option[3]&0x0f
	if pointer < minTimestampOffset {
		return 2
	}
	if pointer > len(option) {
		if flag != timestampPrespec && option[3]>>4 == 15 {
			return 3
		}
		return -1
	}
	room := 3
	if flag == timestampAndAddr || flag == timestampPrespec {
		room = 7
	}
	if pointer+room > len(option) {
		return 2
	}
	return -1
}
