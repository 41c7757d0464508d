package bridge

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// linger is how long a connection may stay half open: so long after one side
// ended its stream the other must have ended its own.
const linger = time.Second

var errServerClosed = errors.New("closed by the HSM's host")

// carry copies both ways until both sides have ended their streams or one of
// them fails; the caller closes both then. An end of stream is passed on as such,
// so what is still under way the other way arrives; a failure of the HSM's side
// closes the client's at once.
//
// It tells broken how the connection broke, at most once and before the client
// can notice. A p11-kit server ends its stream only when its client has, so its
// end is a failure, too, when it comes first. Once the client has ended there is
// nobody left to miss anything.
//
// A host whose processes are stopped still accepts connections, so a server that
// does not say anything within patience has failed, too: p11-kit's client speaks
// first, as soon as it is connected, and waits for an answer.
func carry(client, server halfCloser, patience time.Duration, broken func(error)) {
	fromClient, fromServer := make(chan end, 1), make(chan end, 1)
	go func() { fromClient <- forward(server, client) }()
	go func() { fromServer <- answer(client, server, patience) }()

	select {
	case first := <-fromClient:
		// Either end of stream, which the server must answer with its own, or
		// a failure. If that is the server's, then reading from it ends at once
		// and tells more: the alert that refuses our certificate, for one.
		deadline := time.Now().Add(linger)
		_ = server.SetDeadline(deadline)
		_ = client.SetWriteDeadline(deadline)
		if first.err == nil {
			_ = server.CloseWrite() // if it fails, so does reading
			<-fromServer
			return
		}
		second := <-fromServer
		if second.err == nil || errors.Is(second.err, os.ErrDeadlineExceeded) {
			second = first
		}
		broken(second.err)
	case first := <-fromServer:
		broken(cmp.Or(first.err, errServerClosed))
		if first.err != nil {
			_ = client.Close()
			_ = server.Close()
		} else {
			deadline := time.Now().Add(linger)
			_ = client.SetDeadline(deadline)
			_ = server.SetWriteDeadline(deadline)
			_ = client.CloseWrite()
		}
		<-fromClient
	}
}

// end is how copying one way ended: without error at the end of the stream.
type end struct{ err error }

func forward(dst io.Writer, src io.Reader) end {
	_, err := io.Copy(dst, src)
	return end{err}
}

// answer is forward for what the server says.
func answer(client, server halfCloser, patience time.Duration) end {
	timer := time.AfterFunc(patience, func() { _ = server.SetReadDeadline(time.Now()) })
	buffer := make([]byte, 4096)
	n, err := server.Read(buffer)
	timer.Stop()
	if err == nil {
		_, err = client.Write(buffer[:n])
	}
	switch {
	case errors.Is(err, io.EOF):
		return end{}
	case errors.Is(err, os.ErrDeadlineExceeded):
		return end{fmt.Errorf("connected, but there is no answer: %w", err)}
	case err != nil:
		return end{err}
	}
	return forward(client, server)
}
