// Package balance spreads sessions over many HSMs.
//
// A [Balancer] is a [sessionpool.Source] over the endpoints of balance lists: text
// files with one HSM a line. Each new session goes to the next endpoint of the
// current list, whatever its load; one that does not answer is suspended for a
// while, and then one session is opened on it to see; when none of a list answers, the next
// list becomes the current one and stays so until it fails in turn.
//
// The files may be rewritten at any time: a [Balancer] with Config.Refresh reads
// them again. Invalid ones change nothing. When the content has changed, sessions
// finish what they do and are closed, and new ones use the new lists.
//
// # Endpoints
//
// A PKCS#11 URI names a token of a library on this machine. "<address> <port>"
// is an HSM that listens there: what that means, Config.Remote says. By p11-kit's
// protocol ([RemoteP11Kit]) an endpoint is reached through p11-kit-client.so and a
// bridge in this process that speaks TCP or TLS; since one p11-kit connection
// serves one call at a time, an endpoint has as many as there are sessions in use.
// With [RemoteModule] it is a private instance of the vendor's library, whose
// environment tells it the address.
//
// # Failing over
//
// Acquire does not fail while one endpoint works. What was begun on a session that
// dies is made again by those who may: see [sessionpool.Retry].
//
// # Goroutines
//
// Callers take sessions that are in the caches of the endpoints' pools. Opening
// one is for visits: one at a time for each endpoint, in the background, so that
// whoever can turn to another HSM never waits for one that hangs, and whoever
// cannot waits as long as one PKCS#11 call may take. Visits, and connections that
// are closed because no list names their endpoint any more, are tasks of the
// Balancer; one more goroutine reads the lists. Close ends all of them. No lock is
// held across a call into a library.
package balance
