// Checks the compiled kernels without Python: build it with kernels/*.cpp, in any combination of
// compiler, sanitizer and (emulated) processor; tests/kernels/test_kernels_native.py does.
//
//   check [--cases N] [--seed S] [--seconds T] ISA...
//
// runs N random cases of every function on every instruction set named, then goes on with other
// cases until T seconds have passed. It prints a line for each function and instruction set, and
// for each failure what repeats it; the status is 1 if there was one.
#include <setjmp.h>
#include <signal.h>

#include <chrono>
#include <string>
#include <thread>

#include "../../kernels/qkit.h"
#include "harness.h"

namespace {

std::atomic<int64_t> shared_calls{0};

// What GOMP_parallel does: the task on `threads` threads, of which the caller is one.
void pool(void (*task)(void*), void* data, unsigned threads, unsigned) {
    ++shared_calls;
    const Case* test = Case::current;
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i)
        others.emplace_back([=] {
            Case::current = test;
            task(data);
        });
    task(data);
    for (std::thread& other : others) other.join();
}

struct sigaction before;
sigjmp_buf out_of_fault;
volatile sig_atomic_t fault_expected = 0;

// Says which case it was, and leaves the rest to who handled faults before (a sanitizer does).
void fault(int signal) {
    if (fault_expected) siglongjmp(out_of_fault, 1);
    if (const Case* test = Case::current) {
        char text[500];
        int n = snprintf(text, sizeof text, "FAILED %s %s --seed %llu --cases 1 (%s): fault\n",
                         test->function, test->isa, (unsigned long long)test->seed, test->what);
        if (write(STDOUT_FILENO, text, (size_t)n) < 0) _exit(1);
    }
    sigaction(signal, &before, nullptr);
}

void catch_faults() {
    struct sigaction action = {};
    action.sa_handler = fault;
    action.sa_flags = SA_NODEFER;
    sigaction(SIGSEGV, &action, &before);
}

// Whether touching this byte faults.
bool faults(volatile uint8_t* byte) {
    fault_expected = 1;
    bool faulted = sigsetjmp(out_of_fault, 1);
    if (!faulted) *byte = *byte;
    fault_expected = 0;
    return faulted;
}

// The checks can see: one byte past a buffer faults, or changes its margin.
bool guarded() {
    for (Place place : {END, BEGIN, MIDDLE}) {
        Case test("guard pages", "", 0);
        Buffer<uint8_t> buffer(test, "buffer", 100, place);
        if (faults(buffer.data()) || faults(buffer.data() + 99)) return false;
        if (faults(buffer.data() + 100) != (place == END)) return false;
        if (faults(buffer.data() - 1) != (place == BEGIN)) return false;
    }
    return true;
}

int64_t run(const Check* checks, const char* isa, uint64_t seed, int64_t cases) {
    int64_t failures = Case::failures;
    for (; checks->function; ++checks)
        for (int64_t i = 0; i < cases; ++i) {
            Case test(checks->function, isa, seed + (uint64_t)i);
            checks->run(test);
        }
    return Case::failures - failures;
}

// A line for each function.
void report(const Check* checks, const char* isa, uint64_t seed, int64_t cases) {
    for (; checks->function; ++checks) {
        const Check one[] = {*checks, {nullptr, nullptr}};
        int64_t failed = run(one, isa, seed, cases);
        printf("%s %s: %lld cases, %lld failed\n", checks->function, isa, (long long)cases,
               (long long)failed);
    }
}

// Several callers at once, each with all functions, and each using several threads.
void run_at_once(const char* isa, uint64_t seed, int64_t cases) {
    std::vector<std::thread> callers;
    for (uint64_t i = 0; i < 4; ++i)
        callers.emplace_back(
            [=] { run(array_checks, isa, seed + i * (uint64_t)cases, cases); });
    for (std::thread& caller : callers) caller.join();
}

}  // namespace

int main(int count, char** arguments) {
    using Clock = std::chrono::steady_clock;
    Clock::time_point start = Clock::now();
    int64_t cases = 300, seconds = 0;
    uint64_t seed = 1;
    std::vector<std::string> wanted;
    std::vector<const char*> isas;
    for (int i = 1; i < count; ++i) {
        std::string word = arguments[i];
        if (word[0] != '-') {
            wanted.push_back(word);
            continue;
        }
        char* end = nullptr;
        long long value = i + 1 < count ? strtoll(arguments[++i], &end, 10) : -1;
        bool good = end && !*end && value >= 0;
        if (good && word == "--cases") cases = value;
        else if (good && word == "--seconds") seconds = value;
        else if (good && word == "--seed") seed = (uint64_t)value;
        else wanted.clear(), i = count;
    }
    if (wanted.empty()) {
        fprintf(stderr, "check [--cases N] [--seed S] [--seconds T] ISA...\n");
        return 2;
    }
    if (qkit_abi() != QKIT_ABI) return 1;
    setvbuf(stdout, nullptr, _IOLBF, 0);
    catch_faults();
    if (!guarded()) {
        printf("FAILED: a guard page does not guard\n");
        return 1;
    }
    qkit_set_pool(pool);
    // Before any choice: the first calls of several threads all choose.
    run_at_once("first use", seed, 1);

    for (const std::string& name : wanted) {
        const char* isa = qkit_use(name.c_str());
        if (!isa) {
            printf("%s: not on this machine\n", name.c_str());
            continue;
        }
        isas.push_back(isa);
        for (const Check* list : {array_checks, choice_checks})
            report(list, isa, seed, cases);
        int64_t each = cases / 8 + 1, failures = Case::failures;
        run_at_once(isa, seed, each);
        printf("4 callers %s: %lld cases each, %lld failed\n", isa, (long long)each,
               (long long)(Case::failures - failures));
    }
    report(entropy_checks, "all", seed, cases);
    int64_t more = 0;
    for (; Clock::now() - start < std::chrono::seconds(seconds); ++more) {
        uint64_t next = seed + (uint64_t)(cases + more);
        for (const char* isa : isas) {
            qkit_use(isa);
            run(array_checks, isa, next, 1);
            run(choice_checks, isa, next, 1);
        }
        run(entropy_checks, "all", next, 1);
    }
    if (seconds) printf("%lld more cases of each\n", (long long)more);
    printf("shared between threads: %lld calls\n", (long long)shared_calls);
    printf("%lld failed\n", (long long)Case::failures);
    return Case::failures || isas.empty();
}
