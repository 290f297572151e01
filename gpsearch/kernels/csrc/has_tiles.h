/* HAS_TILES: this compiler knows AMX, and the system is one that gives it to those who ask. */

#if defined(__linux__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>) || (defined(__clang__) && __has_include(<amxintrin.h>))
#define HAS_TILES
#endif
#endif
