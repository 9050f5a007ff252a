package lab

import (
	"context"

	"golang.org/x/sync/errgroup"
)

// inParallel runs f for each item, at most limit at a time. The first error cancels the others' context and is
// returned when all have ended.
func inParallel[T any](ctx context.Context, limit int, items []T, f func(context.Context, T) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(limit)
	for _, item := range items {
		g.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			return f(ctx, item)
		})
	}
	return g.Wait()
}
