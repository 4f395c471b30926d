# Fails if an object file defines a weak function or object.
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --demangle --defined-only ${object} OUTPUT_VARIABLE symbols
    COMMAND_ERROR_IS_FATAL ANY)
  string(REPLACE "\n" ";" lines "${symbols}")
  foreach(line IN LISTS lines)
    # DW.ref.*: the compiler's own pointer to the exception handler, the same everywhere.
    if(line MATCHES "^[0-9a-f]+ [WVu] " AND NOT line MATCHES "DW\\.ref\\.")
      message(SEND_ERROR "${object} defines a weak symbol: ${line}")
    endif()
  endforeach()
endforeach()
