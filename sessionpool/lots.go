package sessionpool

/*
#cgo nocallback hk_signer_start
#cgo nocallback hk_signer_add
#cgo nocallback hk_signer_end
#include "signer.h"
*/
import "C"

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"time"
	"unsafe"

	"github.com/miekg/pkcs11"
)

// SignLots signs on a thread of C's own, which finds the next lot waiting when it
// is done with one. A goroutine in C would hold a processor of Go's scheduler: one
// that stays there for long has the scheduler look after it every few microseconds,
// and one that does not goes back and forth all the time; either costs some percent
// of a core. Here the goroutine waits as for a network, and the scheduler sleeps.
func (n *native) SignLots(ctx context.Context, h pkcs11.SessionHandle, m *pkcs11.Mechanism, key pkcs11.ObjectHandle, size int, next func() *Lot, done func(*Lot)) error {
	t := n.startSigner(h, m, key)
	if t == nil {
		return SignEach(ctx, n, h, m, key, size, next, done)
	}
	defer t.end()
	stopWaiting := context.AfterFunc(ctx, func() { _ = t.done.SetReadDeadline(time.Now()) })
	defer stopWaiting()
	for {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		for len(t.lots) < C.HK_DEPTH {
			lot := next()
			if lot == nil {
				break
			}
			t.add(lot, size)
		}
		if len(t.lots) == 0 {
			return nil
		}
		lot, err := t.wait()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return ctx.Err()
		}
		if err != nil {
			return err
		}
		done(lot)
	}
}

// signer is a thread of C's that signs, and what it was given.
type signer struct {
	c          *C.hk_signer
	done, tell *os.File       // what became of each lot
	pins       runtime.Pinner // of the mechanism
	lots       []pinnedLot    // that it has, in their order
}

// pinnedLot is a lot of which C has addresses.
type pinnedLot struct {
	*Lot
	pins *runtime.Pinner
}

// startSigner returns nil if there can be none.
func (n *native) startSigner(h pkcs11.SessionHandle, m *pkcs11.Mechanism, key pkcs11.ObjectHandle) *signer {
	if n.functions == nil {
		return nil
	}
	done, tell, err := os.Pipe()
	if err != nil {
		return nil
	}
	t := &signer{done: done, tell: tell}
	t.c = C.hk_signer_start(n.functions, C.hk_ulong(h), C.hk_mechanism{
		C.hk_ulong(m.Mechanism), pinned(&t.pins, m.Parameter), C.hk_ulong(len(m.Parameter)),
	}, C.hk_ulong(key), C.int(t.tell.Fd()))
	if t.c == nil {
		t.free()
		return nil
	}
	return t
}

// pinned is the address of a slice's elements, which stay there.
func pinned[T any](pins *runtime.Pinner, slice []T) unsafe.Pointer {
	first := unsafe.SliceData(slice)
	if cap(slice) > 0 {
		pins.Pin(first)
	}
	return unsafe.Pointer(first)
}

// add gives a lot to the thread.
func (t *signer) add(lot *Lot, size int) {
	all := len(lot.Ends) * size
	lot.Signatures = slices.Grow(lot.Signatures[:0], all)[:all]
	l := pinnedLot{lot, new(runtime.Pinner)}
	t.lots = append(t.lots, l)
	C.hk_signer_add(t.c, C.hk_lot{
		data:  (*C.uchar)(pinned(l.pins, lot.Data)),
		ends:  (*C.hk_ulong)(pinned(l.pins, lot.Ends)),
		count: C.hk_ulong(len(lot.Ends)),
		sig:   (*C.uchar)(pinned(l.pins, lot.Signatures)),
		size:  C.hk_ulong(size),
	})
}

// wait waits for the first of the lots.
func (t *signer) wait() (*Lot, error) {
	var rv C.hk_ulong
	if _, err := io.ReadFull(t.done, unsafe.Slice((*byte)(unsafe.Pointer(&rv)), unsafe.Sizeof(rv))); err != nil {
		return nil, fmt.Errorf("waiting for a thread: %w", err)
	}
	if rv != 0 {
		return nil, pkcs11.Error(rv)
	}
	l := t.lots[0]
	t.lots = t.lots[1:]
	l.pins.Unpin()
	return l.Lot, nil
}

// end ends the thread after the signature that it is at. From then on nobody
// writes to the lots that it had.
func (t *signer) end() {
	C.hk_signer_end(t.c)
	for _, l := range t.lots {
		l.pins.Unpin()
	}
	t.free()
}

func (t *signer) free() {
	t.pins.Unpin()
	_, _ = t.done.Close(), t.tell.Close()
}
