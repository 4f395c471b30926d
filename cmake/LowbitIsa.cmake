# Instruction sets: each folder of src/cpu named here is compiled with its own flags as an object
# library and exports one kernel table. Nothing else in the project gets -m flags.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(LOWBIT_ISAS avx2 avxvnni avx512vnni avx512bf16 amx)
  set(LOWBIT_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi2)
  set(LOWBIT_FLAGS_avxvnni ${LOWBIT_FLAGS_avx2} -mavxvnni -mgfni)
  # AVX-VNNI and AVX-512 VNNI hold the same 256-bit instruction in two encodings, and many processors
  # have the second only. ON builds the level with that one, so that its kernels can be tested there;
  # AUTO does so where this machine needs it. What ships says OFF.
  set(LOWBIT_AVXVNNI_EVEX OFF CACHE STRING
      "Build the avxvnni level in AVX-512 encoding, for tests: ON, OFF, AUTO")
  set(lowbit_evex ${LOWBIT_AVXVNNI_EVEX})
  if(lowbit_evex STREQUAL "AUTO")
    set(lowbit_evex OFF)
    if(EXISTS /proc/cpuinfo)
      file(STRINGS /proc/cpuinfo cpu_flags REGEX "^flags" LIMIT_COUNT 1)
      if(cpu_flags MATCHES " avx512_vnni" AND NOT cpu_flags MATCHES " avx_vnni")
        set(lowbit_evex ON)
      endif()
    endif()
  endif()
  if(lowbit_evex)
    set(LOWBIT_FLAGS_avxvnni ${LOWBIT_FLAGS_avx2} -mavx512f -mavx512vl -mavx512vnni -mgfni
        -mprefer-vector-width=256 -DLOWBIT_AVXVNNI_EVEX=1)
  endif()
  set(LOWBIT_FLAGS_avx512vnni ${LOWBIT_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
      -mavx512vbmi -mavx512vnni -mgfni -mprefer-vector-width=512)
  set(LOWBIT_FLAGS_avx512bf16 ${LOWBIT_FLAGS_avx512vnni} -mavx512bf16)
  set(LOWBIT_FLAGS_amx ${LOWBIT_FLAGS_avx512bf16} -mamx-tile -mamx-bf16 -mamx-int8)
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag(-mavxvnni LOWBIT_COMPILER_KNOWS_AVXVNNI)  # GCC 11, clang 12
  if(NOT LOWBIT_COMPILER_KNOWS_AVXVNNI AND NOT lowbit_evex)
    list(REMOVE_ITEM LOWBIT_ISAS avxvnni)
  endif()
  check_cxx_compiler_flag(-mamx-bf16 LOWBIT_COMPILER_KNOWS_AMX)  # GCC 11, clang 11
  if(NOT LOWBIT_COMPILER_KNOWS_AMX)
    list(REMOVE_ITEM LOWBIT_ISAS amx)
  endif()
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64|ARM64")
  set(LOWBIT_ISAS neon neondot)
  set(LOWBIT_FLAGS_neon "")
  set(LOWBIT_FLAGS_neondot -march=armv8.2-a+dotprod)
else()
  set(LOWBIT_ISAS "")
endif()

function(lowbit_add_isas target)
  if(lowbit_evex)  # features.cpp asks the processor for what was built
    target_compile_definitions(${target} PRIVATE LOWBIT_AVXVNNI_EVEX=1)
  endif()
  foreach(isa IN LISTS LOWBIT_ISAS)
    file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/src/cpu/${isa}/*.cpp)
    if(NOT sources)
      continue()
    endif()
    add_library(lowbit_${isa} OBJECT ${sources})
    lowbit_options(lowbit_${isa})
    # GCC 12 warns inside its own AVX-512 headers (_mm512_undefined), once per intrinsic.
    target_compile_options(lowbit_${isa} PRIVATE ${LOWBIT_FLAGS_${isa}} -Wno-maybe-uninitialized
                           -Wno-uninitialized)
    if(LOWBIT_SANITIZE)
      # A check around each unaligned vector load makes one kernel file cost GCC minutes and a
      # gigabyte; called instead of inlined, and without those that such loads always satisfy, the
      # same address checks cost a third.
      target_compile_options(lowbit_${isa} PRIVATE
        "SHELL:--param asan-instrumentation-with-call-threshold=0"
        -fno-sanitize=alignment,null,pointer-overflow,object-size,vptr)
    endif()
    target_include_directories(lowbit_${isa} PRIVATE
      ${CMAKE_CURRENT_SOURCE_DIR}/include ${CMAKE_CURRENT_SOURCE_DIR}/src)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:lowbit_${isa}>)
    string(TOUPPER ${isa} upper)
    target_compile_definitions(${target} PRIVATE LOWBIT_HAVE_${upper}=1)
    # A folder may hold quantizers only; select.cpp and linear.cpp must know what to refer to.
    if(EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/src/cpu/${isa}/linear.cpp)
      target_compile_definitions(${target} PRIVATE LOWBIT_LINEAR_${upper}=1)
    endif()
  endforeach()
endfunction()
