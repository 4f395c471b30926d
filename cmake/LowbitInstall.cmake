# What `cmake --install` puts where. Two components:
#   dev     the C++ library: headers, archive, and the files with which find_package(lowbit) gives
#           the target lowbit::lowbit. No torch is involved, in building or in using it.
#   python  the operators' libraries, at their place inside a wheel (pyproject.toml asks for these).
include(CMakePackageConfigHelpers)

install(TARGETS lowbit EXPORT lowbitTargets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT dev)
install(DIRECTORY include/lowbit DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT dev
  FILES_MATCHING PATTERN "*.h")
set(LOWBIT_CONFIG_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/lowbit)
install(EXPORT lowbitTargets NAMESPACE lowbit:: DESTINATION ${LOWBIT_CONFIG_DIR} COMPONENT dev)
configure_package_config_file(
  ${CMAKE_CURRENT_SOURCE_DIR}/cmake/lowbitConfig.cmake.in
  ${CMAKE_CURRENT_BINARY_DIR}/lowbitConfig.cmake
  INSTALL_DESTINATION ${LOWBIT_CONFIG_DIR})
# 0.x: a minor release may change the interface.
write_basic_package_version_file(
  ${CMAKE_CURRENT_BINARY_DIR}/lowbitConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES
  ${CMAKE_CURRENT_BINARY_DIR}/lowbitConfig.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/lowbitConfigVersion.cmake
  DESTINATION ${LOWBIT_CONFIG_DIR} COMPONENT dev)

foreach(ops IN ITEMS lowbit_ops lowbit_ops_cuda)
  if(TARGET ${ops})
    install(TARGETS ${ops} LIBRARY DESTINATION ipex_llm/lib COMPONENT python)
  endif()
endforeach()
