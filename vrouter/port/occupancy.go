package port

import "margay/vrouter"

// occupancy tells how full the socket's rings are: frames that the kernel has received and nobody has read, and frames that it has
// been given and has not sent yet. It may be called from any goroutine, also of a socket that is closed: then they have no room.
func (x *xsk) occupancy() (receive, send vrouter.Queue) {
	x.mapped.Lock()
	defer x.mapped.Unlock()
	if x.closed {
		return receive, send
	}
	// What is ahead is read last, so that the difference is never below zero; the worker may come round in between.
	read, sent := x.rx.consumer.Load(), x.completion.producer.Load()
	receive.Used, receive.Size = uint64(x.rx.producer.Load()-read), uint64(len(x.rx.places))
	send.Used, send.Size = uint64(x.tx.producer.Load()-sent), uint64(len(x.tx.places))
	receive.Used, send.Used = min(receive.Used, receive.Size), min(send.Used, send.Size)
	return receive, send
}

// fuller returns the fuller of two queues.
func fuller(a, b vrouter.Queue) vrouter.Queue {
	if b.Used*max(a.Size, 1) > a.Used*max(b.Size, 1) || a.Size == 0 {
		return b
	}
	return a
}

// queues tells how full the fullest sockets of this queue's are; what names it goes before _receive and _send.
func (b *bypass) queues(what string, number int) []vrouter.Queue {
	if b == nil {
		return nil
	}
	part := b.current.Load()
	if part == nil {
		return nil
	}
	var receive, send vrouter.Queue
	for _, x := range part.list {
		r, s := x.occupancy()
		receive, send = fuller(receive, r), fuller(send, s)
	}
	receive.Name, send.Name = numbered(what+"_receive", number), numbered(what+"_send", number)
	return []vrouter.Queue{receive, send}
}

// queues tells how full the fullest of the pods' sockets are: one figure for all, however many pods there are.
func (p *directPods) queues() []vrouter.Queue {
	receive, send := vrouter.Queue{Name: "pods_receive"}, vrouter.Queue{Name: "pods_send"}
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.open {
		var r, s vrouter.Queue
		if l.xsk != nil {
			r, s = l.xsk.occupancy()
		} else if m, ok := socketMemory(l.fd); ok {
			r.Used, r.Size = uint64(m[memInfoReceiveUsed]), uint64(m[memInfoReceiveSize])
			s.Used, s.Size = uint64(m[memInfoSendUsed]), uint64(m[memInfoSendSize])
		}
		r.Name, s.Name = receive.Name, send.Name
		receive, send = fuller(receive, r), fuller(send, s)
	}
	return []vrouter.Queue{receive, send}
}
