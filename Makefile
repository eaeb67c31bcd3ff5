# make          builds everything          make chat     builds and starts a chat
# make prepare  downloads SmolLM-135M      make test     checks everything, offline
#
# The programs need no more than the one-line builds in README.md; -Wall -Wextra is for us.

CC     = gcc
CFLAGS = -Wall -Wextra

PROGRAMS = main inference parallel

all: $(PROGRAMS)

main: main.c common.h
	$(CC) $(CFLAGS) -O2 -o $@ main.c

inference: inference.c model.h common.h
	$(CC) $(CFLAGS) -O3 -o $@ inference.c -lm

parallel: parallel.c model.h common.h
	$(CC) $(CFLAGS) -O2 -o $@ parallel.c -lm -lpthread

# ------------------------------------------------------------------------------------------------
# The real files. Each is downloaded under another name and gets its own when it is whole.

URL = https://huggingface.co/huangs0/smollm/resolve/main

# $(call fetch,file,size in bytes,first four bytes in hexadecimal)
define fetch
@if [ -e $(1) ]; then echo "$(1) is already here."; exit 0; fi; \
echo "Downloading $(1) ($(2) bytes) ..."; \
if command -v wget >/dev/null; then wget -O $(1).part $(URL)/$(1); \
elif command -v curl >/dev/null; then curl -f -L -o $(1).part $(URL)/$(1); \
else echo "make prepare needs wget or curl."; false; fi || { rm -f $(1).part; \
	echo "$(1) could not be downloaded. Without it, make chat uses the small model."; exit 1; }; \
size=$$(wc -c <$(1).part); start=$$(od -A n -t x1 -N 4 $(1).part | tr -d ' '); \
if [ $$size -ne $(2) ] || [ $$start != $(3) ]; then rm -f $(1).part; \
	echo "What $(URL)/$(1) brought is not the file expected" \
	     "($$size bytes that start with $$start instead of $(2) that start with $(3))."; exit 1; fi; \
mv $(1).part $(1)
endef

prepare:
	$(call fetch,model.bin,143025664,32346b61)
	$(call fetch,tokenizer.bin,725587,51000000)

# ------------------------------------------------------------------------------------------------

chat: all
	@if [ -e model.bin ] && [ -e tokenizer.bin ]; then \
		dir=.; echo "Chatting with the model in this folder. Ctrl-D ends the chat."; \
	else \
		dir=tests/tiny; echo "Chatting with the small model of tests/tiny (make prepare gets" \
			"SmolLM-135M). Ctrl-D ends the chat."; \
	fi; ./main -d $$dir 42 2>log

test: all
	python3 tests/run.py

# e^x of all 2^32 floats against its definition, and how many of them libm rounds otherwise
test_exp:
	mkdir -p tests/build
	$(CC) $(CFLAGS) -O3 -o tests/build/probe_exp tests/probe.c -lm
	tests/build/probe_exp exp 1

bench: all
	python3 tests/bench.py

# The experiments; their results stay in tests/results.
policies threads: all
	python3 tests/experiments.py $@

clean:
	rm -rf $(PROGRAMS) log tests/build tests/__pycache__ __pycache__

clean_bin:
	rm -f model.bin tokenizer.bin model.bin.part tokenizer.bin.part

.PHONY: all prepare chat test test_exp bench policies threads clean clean_bin
