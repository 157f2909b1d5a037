// Macros that state which mutex protects which field. clang checks them with -Wthread-safety (make native-tests); other
// compilers see nothing.
#pragma once

#if defined(__clang__)
#define SHARDSAVE_ANNOTATION(attribute) __attribute__((attribute))
#else
#define SHARDSAVE_ANNOTATION(attribute)
#endif

// For classes: a lock, and an object that holds a lock during its lifetime.
#define CAPABILITY(name) SHARDSAVE_ANNOTATION(capability(name))
#define SCOPED_CAPABILITY SHARDSAVE_ANNOTATION(scoped_lockable)

// For fields: read and written only while the mutex is held.
#define GUARDED_BY(mutex) SHARDSAVE_ANNOTATION(guarded_by(mutex))

// For functions: the caller holds the mutex; the function locks or unlocks it.
#define REQUIRES(...) SHARDSAVE_ANNOTATION(requires_capability(__VA_ARGS__))
#define ACQUIRE(...) SHARDSAVE_ANNOTATION(acquire_capability(__VA_ARGS__))
#define RELEASE(...) SHARDSAVE_ANNOTATION(release_capability(__VA_ARGS__))
