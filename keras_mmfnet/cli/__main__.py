from keras_mmfnet.cli import main

main()
