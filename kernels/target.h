// Compile a region for an instruction set, whatever the flags of the build are.
#pragma once

#define QKIT_STRING(...) #__VA_ARGS__
#if defined(__clang__)
#define TARGET_BEGIN(isa) \
    _Pragma(QKIT_STRING(clang attribute push(__attribute__((target(isa))), apply_to = function)))
#define TARGET_END _Pragma("clang attribute pop")
#else
#define TARGET_BEGIN(isa) _Pragma("GCC push_options") _Pragma(QKIT_STRING(GCC target(isa)))
#define TARGET_END _Pragma("GCC pop_options")
#endif
