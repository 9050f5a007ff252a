package selector

import (
	"slices"
	"strings"
	"testing"
)

var node = map[string]string{"rack": "r1", "zone": "eu-1", "kubernetes.io/hostname": "n1", "empty": "", "has": "x"}

func TestMatches(t *testing.T) {
	for text, want := range map[string]bool{
		"":                                    true,
		"  \t ":                               true,
		"all()":                               true,
		"all( )":                              true,
		"global()":                            true,
		"!all()":                              false,
		"!!all()":                             true,
		"rack == 'r1'":                        true,
		`rack=="r1"`:                          true,
		"rack == 'r2'":                        false,
		"nope == ''":                          false,
		"empty == ''":                         true,
		"rack != 'r1'":                        false,
		"nope != 'r1'":                        true,
		"has(rack)":                           true,
		"has( rack )":                         true,
		"has(nope)":                           false,
		"!has(nope)":                          true,
		"has == 'x'":                          true,
		"rack in {'r0', 'r1'}":                true,
		"rack in{'r0','r2'}":                  false,
		"rack in {}":                          false,
		"nope in {'r1'}":                      false,
		"rack not in {'r1'}":                  false,
		"rack notin {'r2'}":                   true,
		"nope not in {'r1'}":                  true,
		"rack in {'r1',}":                     true,
		"zone contains 'u-'":                  true,
		"zone starts with 'eu'":               true,
		"zone ends with '-1'":                 true,
		"zone ends with 'eu'":                 false,
		"nope contains ''":                    false,
		"rack=='r1' && zone=='eu-2'":          false,
		"rack=='r2' || zone=='eu-1'":          true,
		"rack=='r1' || zone=='x' && !all()":   true, // && binds tighter
		"(rack=='r1' || zone=='x') && !all()": false,
		"!(rack=='r2') && kubernetes.io/hostname=='n1'": true,
		`rack != "it's"`:      true,
		"!rack == 'r1'":       false,
		"((((rack=='r1'))))":  true,
		"rack  ==  'r1'  ":    true,
		"a-b/c.d_e == 'x'":    false,
		"rack starts  with''": true,
	} {
		s, err := Parse(text)
		if err != nil {
			t.Errorf("%q: %v", text, err)
		} else if got := s.Matches(node); got != want {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
	s, err := Parse("has(b) && (a == 'x' || b != 'y')")
	if err != nil || !slices.Equal(s.Labels(), []string{"a", "b"}) {
		t.Errorf("labels: %v, %v", s.Labels(), err)
	}
}

func TestParseErrors(t *testing.T) {
	for text, want := range map[string]string{
		"rack":                      "at its end: expected \"==\"",
		"rack = 'r1'":               `character 6, at "= 'r1'": expected "=="`,
		"rack == r1":                `character 9, at "r1": expected a string in quotes`,
		"rack == 'r1":               "expected a string in quotes",
		"rack == 'r1' zone":         `expected "&&", "||" or the end`,
		"rack == 'r1' &&":           "at its end: expected a label",
		"&& rack == 'r1'":           "expected a label",
		"(rack == 'r1'":             `at its end: expected ")"`,
		"rack == 'r1')":             `expected "&&"`,
		"has(rack":                  `at its end: expected ")"`,
		"has()":                     "expected a label",
		"all(":                      `at its end: expected ")"`,
		"rack in 'r1'":              `expected "{"`,
		"rack in {'r1'":             `at its end: expected "," or "}"`,
		"rack in {'r1' 'r2'}":       `expected "," or "}"`,
		"rack in {r1}":              "expected a string in quotes",
		"rack inside {'r1'}":        `expected "=="`,
		"rack contains":             "at its end: expected a string in quotes",
		"!":                         "at its end: expected a label",
		"rack\n== 'r1'":             "expected \"==\"",
		"ra$ck == 'x'":              "expected \"==\"",
		strings.Repeat("!", 1000):   "at most 100 levels",
		strings.Repeat("(", 1000):   "at most 100 levels",
		strings.Repeat("a", 1000):   "expected a label",
		strings.Repeat(" ", 70_000): "expected at most 65536",
	} {
		if _, err := Parse(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: %v, expected %q", text, err, want)
		}
	}
}

// Whatever is parsed can be evaluated, and its opposite says the opposite.
func FuzzParse(f *testing.F) {
	for _, text := range []string{"all()", "a == 'b'", "!has(a) || b not in {'c', \"d\"}", "(a starts with 'x') && b != 'y'", "a in {}"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := Parse(text)
		if err != nil {
			return
		}
		opposite, err := Parse("!(" + text + ")")
		if strings.TrimLeft(text, " \t") == "" {
			return // nothing, and so everything
		}
		if err != nil {
			if strings.Contains(err.Error(), "at most") {
				return // a level or two bytes too many
			}
			t.Fatalf("%q: parsed alone, but not negated: %v", text, err)
		}
		labels := map[string]string{}
		for i, l := range s.Labels() {
			if s.Matches(labels) == opposite.Matches(labels) {
				t.Fatalf("%q and its opposite agree on %v", text, labels)
			}
			labels[l] = text[:i%(len(text)+1)]
		}
	})
}
