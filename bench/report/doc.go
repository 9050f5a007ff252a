// Package report turns what the suite has measured into a verdict on each target, JSON, a Markdown page and plots.
package report
