package batchfile_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"

	"github.com/hsmkey/hsmkey/internal/batchfile"
)

// all reads every line, as "number:text" or "number!" for one that is too long.
func all(t testing.TB, input io.Reader) []string {
	t.Helper()
	var got []string
	for lines := batchfile.NewLines(input, batchfile.MaxLine); ; {
		line, err := lines.Next()
		switch {
		case errors.Is(err, io.EOF):
			return got
		case err != nil:
			t.Fatal(err)
		case errors.Is(line.Err, batchfile.TooLongError(batchfile.MaxLine)) && len(line.Text) == 0:
			got = append(got, string(rune('0'+line.Number))+"!")
		case line.Err != nil:
			t.Fatal(line.Err)
		default:
			got = append(got, string(rune('0'+line.Number))+":"+string(line.Text))
		}
	}
}

func TestLinesEndAsOnAnySystem(t *testing.T) {
	for input, want := range map[string][]string{
		"":                    nil,
		"\n\n":                nil,
		"a":                   {"1:a"},
		"a\nb\n":              {"1:a", "2:b"},
		"a\r\nb\r\n":          {"1:a", "2:b"},
		"a\r":                 {"1:a"},
		"\n \t\na\n\n b":      {"3:a", "5: b"},
		"\uFEFFa\n\uFEFFb":    {"1:a", "2:\uFEFFb"},
		"\uFEFF\na":           {"2:a"},
		"\x00\xff\n\x00":      {"1:\x00\xff", "2:\x00"},
		"a\rb\nc":             {"1:a\rb", "2:c"},
		"\uFEFF":              nil,
		"\uFEFF\r\n":          nil,
		"{\"a\":1}\n\n\n{}\n": {`1:{"a":1}`, "4:{}"},
	} {
		if diff := cmp.Diff(want, all(t, strings.NewReader(input))); diff != "" {
			t.Errorf("%q: (-want +got)\n%s", input, diff)
		}
		if diff := cmp.Diff(want, all(t, iotest.OneByteReader(strings.NewReader(input)))); diff != "" {
			t.Errorf("%q, byte by byte: (-want +got)\n%s", input, diff)
		}
	}
}

func TestALineOfTheLongestLengthIsReadAndALongerOneIsNot(t *testing.T) {
	longest := strings.Repeat("x", batchfile.MaxLine)
	for _, end := range []string{"\n", "\r\n", ""} {
		got := all(t, strings.NewReader("a\n"+longest+end))
		if len(got) != 2 || got[1] != "2:"+longest {
			t.Errorf("end %q: the longest line is not read", end)
		}
		got = all(t, strings.NewReader(longest+"x"+end))
		if diff := cmp.Diff([]string{"1!"}, got); diff != "" {
			t.Errorf("end %q: (-want +got)\n%s", end, diff)
		}
	}
	got := all(t, strings.NewReader(longest+longest+longest+"\nb\n"))
	if diff := cmp.Diff([]string{"1!", "2:b"}, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// endless is a line that never ends, as far as anyone will look.
type endless struct{ left int }

func (e *endless) Read(p []byte) (int, error) {
	if e.left == 0 {
		return 0, io.EOF
	}
	n := min(len(p), e.left)
	e.left -= n
	return n, nil
}

func TestALineOf100MiBIsNotHeld(t *testing.T) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if got := all(t, &endless{left: 100 << 20}); len(got) != 1 || got[0] != "1!" {
		t.Errorf("got %d lines", len(got))
	}
	runtime.ReadMemStats(&after)
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 8<<20 {
		t.Errorf("it took %d bytes", grown)
	}
}

func TestAnInputThatCannotBeReadIsAnError(t *testing.T) {
	lines := batchfile.NewLines(io.MultiReader(strings.NewReader("a\nb"), iotest.ErrReader(os.ErrPermission)), batchfile.MaxLine)
	if line, err := lines.Next(); err != nil || string(line.Text) != "a" {
		t.Errorf("the first line: %q, %v", line.Text, err)
	}
	if _, err := lines.Next(); !errors.Is(err, os.ErrPermission) {
		t.Errorf("the second line: %v", err)
	}
}

// write opens an output, writes tokens to it, and ends it.
func write(t *testing.T, open func(string) (*batchfile.Output, error), name string, finish bool, tokens ...string) {
	t.Helper()
	o, err := open(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := o.Begin(); err != nil {
		t.Fatal(err)
	}
	for _, token := range tokens {
		if err := o.Write(token); err != nil {
			t.Fatal(err)
		}
	}
	if finish {
		err = o.Finish()
	} else {
		_, err = o.Abandon()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// holds checks what files of a directory have in them: name, content, name, ...
func holds(t *testing.T, dir string, files ...string) {
	t.Helper()
	want, got := map[string]string{}, map[string]string{}
	for i := 0; i < len(files); i += 2 {
		want[files[i]] = files[i+1]
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		content, err := os.ReadFile(filepath.Join(dir, entry.Name()))
		if err != nil {
			t.Fatal(err)
		}
		got[entry.Name()] = string(content)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("files (-want +got)\n%s", diff)
	}
}

func TestAnOutputHasItsNameWhenItIsComplete(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "out")
	write(t, batchfile.Create, name, false, "a", "b")
	holds(t, dir, "out.partial", "a\nb\n")
	if _, err := batchfile.Create(name); !errors.Is(err, batchfile.ErrUnfinished) {
		t.Errorf("Create = %v, want ErrUnfinished", err)
	}
	write(t, batchfile.Resume, name, true, "c")
	holds(t, dir, "out", "a\nb\nc\n")
	write(t, batchfile.Create, name, true, "d")
	holds(t, dir, "out", "d\n")
	write(t, batchfile.Create, name, false)
	holds(t, dir, "out", "d\n")
}

func TestATornLineIsCutOffWhenTheOutputGoesOn(t *testing.T) {
	for content, kept := range map[string]string{
		"":         "",
		"a":        "",
		"a\n":      "a\n",
		"a\nb":     "a\n",
		"a\n\x00":  "a\n",
		"a\nb\nc.": "a\nb\n",
		strings.Repeat("x", 200000) + "\n" + strings.Repeat("y", 200000): strings.Repeat("x", 200000) + "\n",
		strings.Repeat("y", 200000):                                      "",
	} {
		for _, suffix := range []string{"", batchfile.Suffix} {
			dir := t.TempDir()
			name := filepath.Join(dir, "out")
			if err := os.WriteFile(name+suffix, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			o, err := batchfile.Resume(name)
			if err != nil {
				t.Fatal(err)
			}
			holds(t, dir, "out"+suffix, content) // nothing is changed yet
			if o.Size() != int64(len(kept)) || o.Finished() != (suffix == "" && kept == content) {
				t.Errorf("%.10q: size %d and finished %v", content, o.Size(), o.Finished())
			}
			var tokens bytes.Buffer
			for lines := o.Tokens(); ; {
				line, err := lines.Next()
				if err != nil {
					break
				}
				tokens.Write(append(line.Text, '\n'))
			}
			if tokens.String() != kept {
				t.Errorf("%.10q: it holds %.10q", content, tokens.String())
			}
			if err := o.Begin(); err != nil {
				t.Fatal(err)
			}
			if err := o.Write("z"); err != nil {
				t.Fatal(err)
			}
			if err := o.Finish(); err != nil {
				t.Fatal(err)
			}
			holds(t, dir, "out", kept+"z\n")
		}
	}
}

func TestATokenMayBeLongerThanALineOfClaims(t *testing.T) {
	name := filepath.Join(t.TempDir(), "out")
	longest := strings.Repeat("x", batchfile.MaxToken)
	write(t, batchfile.Create, name, false, longest, longest+"x", "a")
	o, err := batchfile.Resume(name)
	if err != nil {
		t.Fatal(err)
	}
	tokens := o.Tokens()
	for i, want := range []string{longest, "", "a"} {
		line, err := tokens.Next()
		if err != nil || string(line.Text) != want || (line.Err != nil) != (want == "") {
			t.Errorf("token %d: %d bytes, %v, %v", i+1, len(line.Text), line.Err, err)
		}
	}
	if _, err := o.Abandon(); err != nil {
		t.Error(err)
	}
}

func TestAFinishedOutputStaysWhileItIsContinued(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "out")
	write(t, batchfile.Create, name, true, "a")
	o, err := batchfile.Resume(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := o.Begin(); err != nil {
		t.Fatal(err)
	}
	if err := o.Write("b"); err != nil {
		t.Fatal(err)
	}
	if kept, err := o.Abandon(); err != nil || kept != name+batchfile.Suffix {
		t.Errorf("Abandon = %q, %v", kept, err)
	}
	holds(t, dir, "out", "a\n", "out.partial", "a\nb\n")

	// Given up before it began, nothing happens to it.
	write(t, batchfile.Resume, name, true)
	holds(t, dir, "out", "a\nb\n")
	o, err = batchfile.Resume(name)
	if err != nil {
		t.Fatal(err)
	}
	if kept, err := o.Abandon(); err != nil || kept != "" {
		t.Errorf("Abandon = %q, %v", kept, err)
	}
	holds(t, dir, "out", "a\nb\n")
}

func TestAnOutputIsWrittenByOneAtATime(t *testing.T) {
	name := filepath.Join(t.TempDir(), "out")
	o, err := batchfile.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	for _, open := range []func(string) (*batchfile.Output, error){batchfile.Create, batchfile.Resume} {
		if _, err := open(name); !errors.Is(err, batchfile.ErrInUse) {
			t.Errorf("it is opened again: %v, want ErrInUse", err)
		}
	}
	if _, err := o.Abandon(); err != nil {
		t.Fatal(err)
	}
	write(t, batchfile.Resume, name, true, "a")
}

func TestOfManyWhoBeginAnOutputOneMay(t *testing.T) {
	name := filepath.Join(t.TempDir(), "out")
	var began atomic.Int32
	for range 500 {
		var group sync.WaitGroup
		for range 4 {
			group.Go(func() {
				o, err := batchfile.Create(name)
				if errors.Is(err, batchfile.ErrInUse) {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
				if began.Add(1) != 1 {
					t.Error("two write it")
				}
				began.Add(-1)
				if _, err := o.Abandon(); err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
	}
}

func TestAnEmptyUnfinishedOutputIsNone(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "out")
	empty := func() {
		if err := os.WriteFile(name+batchfile.Suffix, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	empty()
	write(t, batchfile.Create, name, true, "a")
	holds(t, dir, "out", "a\n")
	if info, err := os.Stat(name); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the output has the mode of what was there: %v, %v", info.Mode(), err)
	}
	empty()
	o, err := batchfile.Resume(name)
	if err != nil || !o.Finished() {
		t.Fatalf("the finished output is not what is resumed: %v", err)
	}
	if _, err := o.Abandon(); err != nil {
		t.Error(err)
	}
	holds(t, dir, "out", "a\n")
}

func TestAnOutputThatSomebodyTookAwayIsNotFinished(t *testing.T) {
	for what, take := range map[string]func(string) error{
		"removed": os.Remove,
		"replaced": func(path string) error {
			return errors.Join(os.Remove(path), os.WriteFile(path, []byte("x\n"), 0o600))
		},
	} {
		for _, end := range []func(*batchfile.Output) error{
			(*batchfile.Output).Finish,
			func(o *batchfile.Output) error { _, err := o.Abandon(); return err },
		} {
			dir := t.TempDir()
			name := filepath.Join(dir, "out")
			o, err := batchfile.Create(name)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(o.Begin(), take(name+batchfile.Suffix)); err != nil {
				t.Fatal(err)
			}
			if err := end(o); !errors.Is(err, batchfile.ErrReplaced) {
				t.Errorf("%s: %v, want ErrReplaced", what, err)
			}
			if what == "removed" {
				holds(t, dir)
			} else {
				holds(t, dir, "out.partial", "x\n")
			}
		}
	}
}

func TestWhatIsNoFileIsNoOutput(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := errors.Join(
		os.Mkdir(path("dir"), 0o700),
		syscall.Mkfifo(path("pipe"), 0o600),
		os.Symlink("pipe", path("link")),
		os.Symlink("circle", path("circle")),
		os.Mkdir(path("blocked.partial"), 0o700),
		syscall.Mkfifo(path("piped.partial"), 0o600),
		os.Symlink("missing", path("linked.partial")),
	); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]error{
		"":                          batchfile.ErrNoFile,
		path("dir"):                 batchfile.ErrNoFile,
		path("dir") + "/":           batchfile.ErrNoFile,
		path("new") + "/":           batchfile.ErrNoFile,
		path("pipe"):                batchfile.ErrNoFile,
		path("link"):                batchfile.ErrNoFile,
		path("piped"):               batchfile.ErrNoFile,
		path("circle"):              syscall.ELOOP,
		path("linked"):              syscall.ELOOP,
		path("blocked"):             syscall.EISDIR,
		path("missing/out"):         os.ErrNotExist,
		path("piped.partial/x/out"): syscall.ENOTDIR,
	} {
		for _, open := range []func(string) (*batchfile.Output, error){batchfile.Create, batchfile.Resume} {
			if _, err := open(name); !errors.Is(err, want) {
				t.Errorf("%q: %v, want %v", name, err, want)
			}
		}
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 7 {
		t.Errorf("there is now %v: %v", left, err)
	}
}

func TestOfALinkTheTargetIsWritten(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := errors.Join(
		os.MkdirAll(path("a/b"), 0o700),
		os.Symlink("a/b", path("b")), // b/.. is a
		os.Symlink("b/../out", path("link")),
		os.Symlink("link", path("link2")),
		os.Symlink(path("link2"), path("link3")),
	); err != nil {
		t.Fatal(err)
	}
	for i, name := range []string{"link3", "link", "b/../out"} {
		if i == 0 {
			write(t, batchfile.Create, dir+"/"+name, false, name) // nothing is there yet
			if _, err := os.Stat(path("a/out.partial")); err != nil {
				t.Error(err)
			}
		}
		write(t, batchfile.Resume, dir+"/"+name, true, name)
	}
	content, err := os.ReadFile(path("a/out"))
	if want := "link3\nlink3\nlink\nb/../out\n"; err != nil || string(content) != want {
		t.Errorf("the target has %q, want %q: %v", content, want, err)
	}
	for _, name := range []string{"link", "link2", "link3"} {
		if _, err := os.Readlink(path(name)); err != nil {
			t.Error(err)
		}
	}
}

// Whatever the input, every line that is not blank is there, in its place and
// unharmed, or is too long.
func FuzzLines(f *testing.F) {
	for _, seed := range []string{"", "a\nb", "\uFEFF{}\r\n", "\r\r\n\n\x00", "\n\n\n"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		lines := batchfile.NewLines(iotest.HalfReader(bytes.NewReader(input)), batchfile.MaxLine)
		for i, want := range bytes.Split(bytes.TrimPrefix(input, []byte("\uFEFF")), []byte("\n")) {
			want = bytes.TrimSuffix(want, []byte("\r"))
			if len(bytes.TrimSpace(want)) == 0 {
				continue
			}
			line, err := lines.Next()
			if err != nil || line.Number != i+1 || !bytes.Equal(line.Text, want) && line.Err == nil {
				t.Fatalf("line %d: %q (%d), %v, want %q", i+1, line.Text, line.Number, err, want)
			}
		}
		if _, err := lines.Next(); !errors.Is(err, io.EOF) {
			t.Fatalf("at the end: %v", err)
		}
	})
}
