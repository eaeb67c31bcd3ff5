# make          builds everything          make chat     builds and starts a chat
# make prepare  downloads SmolLM-135M      make test     runs the tests, offline
#
# The programs are built by the lines of README.md; -Wall -Wextra are for development.

CC := $(if $(filter default,$(origin CC)),gcc,$(CC))
CFLAGS = -Wall -Wextra
PROGRAMS = main inference parallel

all: $(PROGRAMS)

# CFLAGS come after -O, so that "make CFLAGS='-g -O0'" overrides the level of optimisation here.
main: main.c common.h
	$(CC) -o $@ main.c $(CFLAGS)

inference: inference.c model.h common.h
	$(CC) -o $@ inference.c -O3 $(CFLAGS) -lm

parallel: parallel.c model.h common.h
	$(CC) -o $@ parallel.c -O2 $(CFLAGS) -lm -lpthread

# The addresses of SmolLM-135M, and the seconds without data after which the next one is tried
URL     = https://huggingface.co/huangs0/smollm/resolve/main
OLD_URL = https://huggingface.co/huangs0/llama2.c/resolve/main
TIMEOUT = 30

# The engine judges a folder's model: it loads it, or reports what is wrong.
load = ./inference -d $(1) -m 1 1 Hello >/dev/null

prepare: inference
	@if $(call load,.) 2>&1; then echo "The model is already here."; exit 0; fi; \
	if command -v wget >/dev/null; then get="wget -t 1 -T $(TIMEOUT) -O"; \
	elif command -v curl >/dev/null; then \
	get="curl -f -L --connect-timeout $(TIMEOUT) -y $(TIMEOUT) -Y 1 -o"; \
	else echo "make prepare needs wget or curl: install one of them."; exit 1; fi; \
	rm -rf new.part; mkdir new.part || exit 1; \
	for file in model.bin tokenizer.bin; do \
		$$get new.part/$$file $(URL)/$$file || $$get new.part/$$file $(OLD_URL)/$$file || { \
		echo "$$file cannot be downloaded: try later. make chat uses the small model."; exit 1; }; \
	done; \
	$(call load,new.part) && mv -f new.part/* . && rmdir new.part || { \
	echo "The download is not a model, so the files here stay as they were: try later."; exit 1; }

chat: all
	@if [ -e model.bin ] && $(call load,.); then dir=.; else dir=tests/tiny; \
		echo "This is the small model of tests/tiny; make prepare gets SmolLM-135M."; fi; \
	{ true >log; } 2>/dev/null && log=log || log=$$(mktemp); \
	echo "Ctrl-D ends the chat. The log is $$log."; ./main -d $$dir 42 2>$$log

test:
	$(MAKE) -j2 all CFLAGS="$(CFLAGS) -Werror"
	python3 tests/run.py

# e^x of all 2^32 floats against its definition, and how many of them libm rounds otherwise
test_exp:
	mkdir -p tests/build && $(CC) -O3 $(CFLAGS) -o tests/build/exp tests/helpers/probe.c -lm -lpthread
	tests/build/exp exp 1

bench: all
	python3 tests/bench/bench.py

# The experiments, whose results stay in tests/results
policies threads: all
	python3 tests/experiments/experiments.py $@
trace: all
	python3 tests/experiments/trace.py

clean:
	rm -rf $(PROGRAMS) log tests/build __pycache__ tests/__pycache__ tests/*/__pycache__

clean_bin:
	rm -rf model.bin tokenizer.bin new.part

.PHONY: all prepare chat test test_exp bench policies threads trace clean clean_bin
