package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"

	"github.com/hsmkey/hsmkey/internal/batchfile"
)

// catchUp finds the line that comes after the tokens of earlier runs. Each of
// these has to be that of its line, key and options, down to its signature.
func (r *batchRun) catchUp(ctx context.Context) error {
	if r.out != nil && r.out.Size() > 0 {
		signatures, err := newSignatureCheck(r.key, r.signer.Algorithm())
		if err != nil {
			return err
		}
		r.progress.check()
		err = r.passAll(ctx, signatures)
		if number := signatures.failed(); number > 0 {
			err = changed("token %d of the output does not verify", number)
		}
		if err != nil {
			return err
		}
	}
	r.next, r.nextErr = r.lines.Next()
	return nil
}

// passAll goes to the line of the last token.
func (r *batchRun) passAll(ctx context.Context, signatures *signatureCheck) error {
	tokens := r.out.Tokens()
	for !signatures.hasFailed() {
		token, err := tokens.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading the output: %w", err)
		}
		if err := r.pass(ctx, token); err != nil {
			return err
		}
		signatures.add(token)
		r.earlier++
		r.progress.set(r.earlier + r.skipped)
	}
	return nil
}

// pass goes to the line of a token.
func (r *batchRun) pass(ctx context.Context, token batchfile.Line) error {
	header, payload, ok := splitToken(token.Text) // too long for a token is none
	if !ok || header != r.signer.EncodedHeader() {
		return changed("token %d of the output does not have the header that belongs to the key and options", token.Number)
	}
	for ctx.Err() == nil {
		line, err := r.lines.Next()
		switch {
		case errors.Is(err, io.EOF):
			return changed("the output has more tokens than the input has lines of claims, which is %d", r.earlier)
		case err != nil:
			return inputError(err)
		case r.claims.made(payload, line.Text):
			return nil
		}
		_, reason := r.prepare(0, line.Text)
		switch {
		case reason == nil:
			return changed("token %d of the output does not have the claims of line %d", token.Number, line.Number)
		case !r.opts.Skip:
			return changed("line %d cannot be signed, and still the output goes on after it", line.Number)
		}
		r.skip(lineError(line.Number, reason))
	}
	return ctx.Err()
}

func changed(format string, args ...any) error {
	return withHint(usagef("--resume: "+format, args...), "go on with the same --in, --key and options, or begin anew without --resume")
}

// splitToken takes a compact token apart.
func splitToken(token []byte) (header string, payload []byte, ok bool) {
	parts := bytes.Split(token, []byte("."))
	if len(parts) != 3 || len(parts[2]) == 0 {
		return "", nil, false
	}
	payload, err := base64.RawURLEncoding.DecodeString(string(parts[1]))
	return string(parts[0]), payload, err == nil
}
