# Installs the library, builds the consumer against the install tree alone, runs it, and looks for
# torch in everything that the compiler, the linker and the loader saw.
#   cmake -DBUILD=<build of lowbit> -DSOURCE=<project> -DWORK=<scratch> -DCXX=<compiler>
#         [-DEMULATOR=<what runs the compiler's programs here>] -P run.cmake
function(run)
  execute_process(COMMAND ${ARGV} RESULT_VARIABLE status OUTPUT_VARIABLE text ERROR_VARIABLE text)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "failed: ${ARGV}\n${text}")
  endif()
  set(output "${text}" PARENT_SCOPE)
endfunction()

function(refuse_torch what text)
  string(TOLOWER "${text}" text)
  # Paths of the checkout itself may contain any word.
  string(TOLOWER "${SOURCE}" source)
  string(TOLOWER "${WORK}" work)
  string(REPLACE "${source}" "" text "${text}")
  string(REPLACE "${work}" "" text "${text}")
  # At the start of a word, or behind what a linker or compiler puts before a name: an address that
  # the loader prints may hold the digits "c10".
  if(text MATCHES "(^|[^a-z0-9])(lib|[il])?(torch|c10|aten)")
    message(FATAL_ERROR "${what} mentions torch:\n${text}")
  endif()
endfunction()

file(REMOVE_RECURSE ${WORK})
run(${CMAKE_COMMAND} --install ${BUILD} --component dev --prefix ${WORK}/prefix)
refuse_torch("the list of installed files" "${output}")
file(GLOB_RECURSE headers ${WORK}/prefix/include/*.h)
if(NOT headers)
  message(FATAL_ERROR "no header was installed")
endif()
foreach(header IN LISTS headers)
  file(READ ${header} text)
  if(text MATCHES "#include *[<\"](torch|ATen|c10)")
    message(FATAL_ERROR "${header} includes torch")
  endif()
endforeach()

run(${CMAKE_COMMAND} -S ${SOURCE} -B ${WORK}/build -DCMAKE_PREFIX_PATH=${WORK}/prefix
    -DCMAKE_CXX_COMPILER=${CXX} -DCMAKE_BUILD_TYPE=Release -DCMAKE_EXPORT_COMPILE_COMMANDS=ON
    -DCMAKE_CXX_FLAGS=${FLAGS} -DCMAKE_FIND_USE_PACKAGE_REGISTRY=OFF)
run(${CMAKE_COMMAND} --build ${WORK}/build --verbose)
refuse_torch("the consumer's build" "${output}")
file(READ ${WORK}/build/compile_commands.json commands)
refuse_torch("the compile command" "${commands}")
run(${EMULATOR} ${WORK}/build/consumer)
message(STATUS "${output}")
find_program(LDD ldd)
if(LDD AND NOT EMULATOR)  # ldd knows this machine's programs only
  run(${LDD} ${WORK}/build/consumer)
  refuse_torch("the list of loaded libraries" "${output}")
endif()
