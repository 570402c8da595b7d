"""What a merge will do, as pure data: printing it is the dry run, running it is `lorafold.engine`."""
