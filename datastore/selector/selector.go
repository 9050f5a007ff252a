// Package selector evaluates Calico's label selectors: what an IPPool's nodeSelector says.
//
//	selector = and { "||" and }
//	and      = term { "&&" term }
//	term     = "!" term | "(" selector ")" | "all()" | "global()" | "has(" label ")"
//	         | label ("==" | "!=" | "contains" | "starts with" | "ends with") string
//	         | label ("in" | "not in") "{" [ string { "," string } ] "}"
//
// A string stands in single or double quotes, without escapes. The empty selector selects everything. What asks for a
// value is false where the label is missing; "!=" and "not in" are true there.
package selector

import (
	"fmt"
	"slices"
	"strings"
)

// MaxLength bounds a selector, bytes; maxDepth how deep parentheses and "!" may nest. Both keep a hostile one from
// costing more than it is worth.
const (
	MaxLength = 1 << 16
	maxDepth  = 100
)

// Selector is a parsed selector. It is immutable, and safe for concurrent use.
type Selector struct {
	root   expr
	labels []string
}

// expr says whether labels are selected.
type expr func(labels map[string]string) bool

// Matches says whether the labels are selected; nil is no labels.
func (s *Selector) Matches(labels map[string]string) bool { return s.root(labels) }

// Labels lists the labels that the selector asks about, sorted: what it says of others follows from none of theirs.
func (s *Selector) Labels() []string { return s.labels }

// Parse reads a selector; the error says where it went wrong, and what was expected there.
func Parse(text string) (*Selector, error) {
	if len(text) > MaxLength {
		return nil, fmt.Errorf("selector of %d bytes: expected at most %d", len(text), MaxLength)
	}
	p := &parser{text: text}
	if p.skipBlanks(); p.at == len(text) {
		return &Selector{root: all}, nil
	}
	root, err := p.or()
	if err != nil {
		return nil, err
	}
	if p.at < len(text) {
		return nil, p.expected(`"&&", "||" or the end`)
	}
	slices.Sort(p.labels)
	return &Selector{root: root, labels: slices.Compact(p.labels)}, nil
}

func all(map[string]string) bool { return true }

// parser goes through the text from left to right. Between terms it stands behind blanks.
type parser struct {
	text   string
	at     int
	depth  int
	labels []string
}

// expected is the error for what stands at the parser's place.
func (p *parser) expected(what string) error {
	rest := p.text[p.at:]
	if len(rest) > 20 {
		rest = rest[:20] + "…"
	}
	if rest == "" {
		return fmt.Errorf("selector: at its end: expected %s", what)
	}
	return fmt.Errorf("selector: character %d, at %q: expected %s", p.at+1, rest, what)
}

func (p *parser) skipBlanks() {
	for p.at < len(p.text) && (p.text[p.at] == ' ' || p.text[p.at] == '\t') {
		p.at++
	}
}

// take moves behind token and the blanks after it, if it stands here.
func (p *parser) take(token string) bool {
	if !strings.HasPrefix(p.text[p.at:], token) {
		return false
	}
	p.at += len(token)
	p.skipBlanks()
	return true
}

// takeWords is take for an operator made of words, of which the last must end here.
func (p *parser) takeWords(words ...string) bool {
	start := p.at
	for _, w := range words {
		if !strings.HasPrefix(p.text[p.at:], w) {
			p.at = start
			return false
		}
		p.at += len(w)
		if w == words[len(words)-1] && p.at < len(p.text) && labelByte(p.text[p.at]) {
			p.at = start
			return false
		}
		p.skipBlanks()
	}
	return true
}

// list parses one or more parts between separators.
func (p *parser) list(separator string, part func() (expr, error), join func([]expr) expr) (expr, error) {
	var parts []expr
	for {
		e, err := part()
		if err != nil {
			return nil, err
		}
		parts = append(parts, e)
		if !p.take(separator) {
			break
		}
	}
	if len(parts) == 1 {
		return parts[0], nil
	}
	return join(parts), nil
}

func (p *parser) or() (expr, error) {
	return p.list("||", p.and, func(parts []expr) expr {
		return func(l map[string]string) bool {
			return slices.ContainsFunc(parts, func(e expr) bool { return e(l) })
		}
	})
}

func (p *parser) and() (expr, error) {
	return p.list("&&", p.term, func(parts []expr) expr {
		return func(l map[string]string) bool {
			return !slices.ContainsFunc(parts, func(e expr) bool { return !e(l) })
		}
	})
}

func (p *parser) term() (expr, error) {
	if p.depth++; p.depth > maxDepth {
		return nil, p.expected(fmt.Sprintf("at most %d levels of parentheses and \"!\"", maxDepth))
	}
	defer func() { p.depth-- }()
	switch {
	case p.take("!"):
		e, err := p.term()
		if err != nil {
			return nil, err
		}
		return func(l map[string]string) bool { return !e(l) }, nil
	case p.take("("):
		e, err := p.or()
		if err == nil && !p.take(")") {
			err = p.expected(`")"`)
		}
		return e, err
	case p.take("all("), p.take("global("):
		if !p.take(")") {
			return nil, p.expected(`")"`)
		}
		return all, nil
	case p.take("has("):
		label, err := p.label()
		if err == nil && !p.take(")") {
			err = p.expected(`")"`)
		}
		return func(l map[string]string) bool { _, ok := l[label]; return ok }, err
	}
	label, err := p.label()
	if err != nil {
		return nil, err
	}
	return p.comparison(label)
}

// comparison parses what follows a label.
func (p *parser) comparison(label string) (expr, error) {
	// with gives the operator's verdict, and absent where the label is missing.
	with := func(absent bool, verdict func(got, want string) bool) (expr, error) {
		want, err := p.quoted()
		return func(l map[string]string) bool {
			if got, ok := l[label]; ok {
				return verdict(got, want)
			}
			return absent
		}, err
	}
	switch {
	case p.take("=="):
		return with(false, func(got, want string) bool { return got == want })
	case p.take("!="):
		return with(true, func(got, want string) bool { return got != want })
	case p.takeWords("contains"):
		return with(false, strings.Contains)
	case p.takeWords("starts", "with"):
		return with(false, strings.HasPrefix)
	case p.takeWords("ends", "with"):
		return with(false, strings.HasSuffix)
	case p.takeWords("not", "in"):
		set, err := p.set()
		return func(l map[string]string) bool { got, ok := l[label]; return !ok || !slices.Contains(set, got) }, err
	case p.takeWords("in"):
		set, err := p.set()
		return func(l map[string]string) bool { got, ok := l[label]; return ok && slices.Contains(set, got) }, err
	}
	return nil, p.expected(`"==", "!=", "in", "not in", "contains", "starts with" or "ends with"`)
}

// label parses a label's name.
func (p *parser) label() (string, error) {
	start := p.at
	for p.at < len(p.text) && labelByte(p.text[p.at]) {
		p.at++
	}
	name := p.text[start:p.at]
	if name == "" || len(name) > 512 {
		p.at = start
		return "", p.expected(`a label, "has(", "all()", "!" or "("`)
	}
	p.labels = append(p.labels, name)
	p.skipBlanks()
	return name, nil
}

func labelByte(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("_./-", c) >= 0
}

// quoted parses a string in quotes.
func (p *parser) quoted() (string, error) {
	if p.at < len(p.text) && (p.text[p.at] == '"' || p.text[p.at] == '\'') {
		rest := p.text[p.at+1:]
		if end := strings.IndexByte(rest, p.text[p.at]); end >= 0 {
			p.at += end + 2
			p.skipBlanks()
			return rest[:end], nil
		}
	}
	return "", p.expected("a string in quotes")
}

// set parses the strings between braces; a comma may stand behind the last, as Calico lets it.
func (p *parser) set() ([]string, error) {
	if !p.take("{") {
		return nil, p.expected(`"{"`)
	}
	var out []string
	for !p.take("}") {
		s, err := p.quoted()
		if err != nil {
			return nil, err
		}
		out = append(out, s)
		if !p.take(",") && !strings.HasPrefix(p.text[p.at:], "}") {
			return nil, p.expected(`"," or "}"`)
		}
	}
	return out, nil
}
