# make          builds everything          make chat     builds and starts a chat
# make prepare  downloads SmolLM-135M      make test     runs the tests, offline
#
# The one-line builds in README.md suffice for the programs; -Wall -Wextra are for development.

CC     = gcc
CFLAGS = -Wall -Wextra

PROGRAMS = main inference parallel

all: $(PROGRAMS)

# CFLAGS come last, so that "make CFLAGS='-g -O0'" overrides the level of optimisation here.
main: main.c common.h
	$(CC) -O2 $(CFLAGS) -o $@ main.c

inference: inference.c model.h common.h
	$(CC) -O3 $(CFLAGS) -o $@ inference.c -lm

parallel: parallel.c model.h common.h
	$(CC) -O2 $(CFLAGS) -o $@ parallel.c -lm -lpthread

# ------------------------------------------------------------------------------------------------
# The real files. Each is downloaded as a .part, which a later attempt resumes, and gets its own name
# when its size and its first four bytes (in hexadecimal) are right.

URL       = https://huggingface.co/huangs0/smollm/resolve/main
OLDER_URL = https://huggingface.co/huangs0/llama2.c/resolve/main

model.bin_is     = 143025664 32346b61
tokenizer.bin_is = 725587 51000000

# Shell functions: usable FILE SIZE START; keep_beginning, which removes a .part that is none
define FUNCTIONS
start() { od -A n -t x1 -N 4 "$$1" | tr -d ' '; }; \
usable() { [ -f "$$1" ] && [ "$$(wc -c <"$$1")" -eq "$$2" ] && [ "$$(start "$$1")" = "$$3" ]; }; \
keep_beginning() { [ -f "$$1" ] && [ "$$(wc -c <"$$1")" -lt "$$2" ] && \
	[ "$$(start "$$1")" = "$$3" ] || rm -f "$$1"; }
endef

# $(call fetch,file)
define fetch
@$(FUNCTIONS); \
if usable $(1) $($(1)_is); then echo "$(1) is already here."; exit 0; fi; \
if command -v wget >/dev/null; then get() { wget -c -t 3 -T 30 -O $(1).part "$$1"; }; \
elif command -v curl >/dev/null; then get() { \
	curl -f -L -C - --retry 2 --connect-timeout 30 -y 30 -Y 1 -o $(1).part "$$1"; }; \
else echo "make prepare needs wget or curl."; exit 1; fi; \
if [ -e $(1) ]; then echo "$(1) is not the file expected and will be replaced."; fi; \
for url in $(URL)/$(1) $(OLDER_URL)/$(1); do \
	keep_beginning $(1).part $($(1)_is); \
	echo "Downloading $$url ..."; \
	if get "$$url" && ! usable $(1).part $($(1)_is); then \
		echo "$$url is not the file expected ($$(wc -c <$(1).part) bytes)."; rm -f $(1).part; \
	fi; \
	if usable $(1).part $($(1)_is); then mv -f $(1).part $(1); exit 0; fi; \
done; \
keep_beginning $(1).part $($(1)_is); \
echo "$(1) could not be downloaded. Without it, make chat uses the small model."; exit 1
endef

prepare:
	$(call fetch,model.bin)
	$(call fetch,tokenizer.bin)

# ------------------------------------------------------------------------------------------------

# The log goes to the folder of temporary files if this one cannot be written.
chat: all
	@$(FUNCTIONS); dir=tests/tiny; log=log; \
	if usable model.bin $(model.bin_is) && usable tokenizer.bin $(tokenizer.bin_is); then \
		dir=.; echo "Chatting with the model in this folder. Ctrl-D ends the chat."; \
	elif [ -e model.bin ] || [ -e tokenizer.bin ]; then \
		echo "The model in this folder is not complete (make prepare gets it). Chatting with the" \
			"small model of tests/tiny. Ctrl-D ends the chat."; \
	else \
		echo "Chatting with the small model of tests/tiny (make prepare gets SmolLM-135M). Ctrl-D" \
			"ends the chat."; \
	fi; \
	if ! { true >>log; } 2>/dev/null; then \
		log=$$(mktemp) && echo "This folder cannot be written: the log is $$log." || log=/dev/null; \
	fi; \
	./main -d $$dir 42 2>$$log

test: all
	python3 tests/run.py

# e^x of all 2^32 floats against its definition, and how many of them libm rounds otherwise
test_exp:
	mkdir -p tests/build
	$(CC) -O3 $(CFLAGS) -o tests/build/probe_exp tests/helpers/probe.c -lm
	tests/build/probe_exp exp 1

bench: all
	python3 tests/bench/bench.py

# The experiments; their results stay in tests/results.
policies threads: all
	python3 tests/experiments/experiments.py $@

clean:
	rm -rf $(PROGRAMS) log tests/build __pycache__ tests/__pycache__ tests/*/__pycache__

clean_bin:
	rm -f model.bin tokenizer.bin model.bin.part tokenizer.bin.part

.PHONY: all prepare chat test test_exp bench policies threads clean clean_bin
