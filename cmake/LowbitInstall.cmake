# find_package(lowbit) gives lowbit::lowbit.
