package filter

import (
	"fmt"
	"strings"
)

// MaxText is the longest filter text, in bytes.
const MaxText = 4096

// token is one word or sign of the text, and where it begins, in bytes from 0.
type token struct {
	text string
	at   int
}

const signs = "()[]!&|<>=:,"

// scan cuts the text into tokens. Signs of two characters are one token. A word is anything else without spaces; the
// colon belongs to a word that looks like an IPv6 address and is a sign elsewhere.
func scan(text string) ([]token, error) {
	if len(text) > MaxText {
		return nil, fmt.Errorf("filter: %d bytes: expected at most %d", len(text), MaxText)
	}
	var out []token
	brackets := 0
	for i := 0; i < len(text); {
		c := text[i]
		switch {
		case c == ' ' || c == '\t' || c == '\n' || c == '\r':
			i++
			continue
		case c < ' ' || c > '~':
			return nil, fmt.Errorf("filter: byte %#x at %d: expected printable ASCII", c, i+1)
		}
		n := 1
		if strings.IndexByte(signs, c) >= 0 && (c != ':' || brackets > 0) {
			if two := text[i:min(i+2, len(text))]; two == "&&" || two == "||" || two == "!=" || two == "<=" || two == ">=" || two == "==" {
				n = 2
			}
			switch c {
			case '[':
				brackets++
			case ']':
				brackets--
			}
		} else {
			for i+n < len(text) && wordByte(text[i+n], brackets > 0) {
				n++
			}
		}
		out = append(out, token{strings.ToLower(text[i : i+n]), i})
		i += n
	}
	return out, nil
}

func wordByte(c byte, inBrackets bool) bool {
	if c <= ' ' || c > '~' {
		return false
	}
	if c == ':' {
		return !inBrackets
	}
	return strings.IndexByte(signs, c) < 0
}
