defmodule VLLM.AllowedModelsTest do
  use ExUnit.Case

  alias VLLM.{AllowedModels, Error, Models}

  defp allowed?(model, patterns) do
    case AllowedModels.check(model, patterns) do
      :ok -> true
      {:error, %Error{reason: :not_allowed}} -> false
    end
  end

  defp configure(patterns) do
    Application.put_env(:ex_vllm, :allowed_models, patterns)
    on_exit(fn -> Application.delete_env(:ex_vllm, :allowed_models) end)
  end

  test "without a list every model is allowed, with an empty one none" do
    assert allowed?("org/name", nil)
    refute allowed?("org/name", [])
  end

  test "names, patterns and regular expressions are compared with the whole name" do
    patterns = ["org/name", "friends/*", ~r/\A[a-z]+-GGUF:Q4_K_M\z/]

    for model <- ["org/name", "friends/a", "friends/a:Q8_0", "tiny-GGUF:Q4_K_M"],
        do: assert(allowed?(model, patterns), model)

    for model <- [
          "org/name2",
          "my-org/name",
          "org/name:Q8_0",
          "friendsX/a",
          "tiny-GGUF",
          "org/nam."
        ],
        do: refute(allowed?(model, patterns), model)

    # The dot of a pattern is a dot.
    refute allowed?("org/aXb", ["org/a.b"])
  end

  @tag :tmp_dir
  test "a path cannot lead out of an allowed folder", %{tmp_dir: folder} do
    inside = Path.join(folder, "models/llama")
    File.mkdir_p!(inside)
    pattern = Path.join(folder, "models/*")
    assert allowed?(inside, [pattern])
    assert allowed?(Path.relative_to_cwd(inside), [pattern])
    assert allowed?(inside, ["./" <> Path.relative_to_cwd(pattern)])
    refute allowed?(Path.join(folder, "models/../other"), [pattern])
    refute allowed?(Path.join(folder, "other"), [pattern])
    # A folder here is what the name stands for, and not a model of the hub.
    refute allowed?(Path.relative_to_cwd(inside), [Path.relative_to_cwd(pattern)])
    refute allowed?("org/../../secret", ["org/*"])
  end

  test "the application's list holds as well, and an option can only narrow it" do
    configure(["org/*"])
    assert allowed?("org/name", nil)
    refute allowed?("other/name", nil)
    refute allowed?("other/name", ["other/*"])
    assert allowed?("org/name", ["org/name"])
    refute allowed?("org/name", ["org/another"])
  end

  test "a list that is none is an error, and no permission" do
    configure("org/*")

    assert {:error, %Error{reason: :invalid_option} = error} =
             AllowedModels.check("org/name", nil)

    assert error.message =~ "a list of strings and regular expressions"
  end

  test "an engine of another model is refused before anything is started" do
    refused = {:allowed_models, ["org/*"]}

    assert {:error, %Error{reason: :not_allowed} = error} =
             VLLM.llm("other/name", [refused, python: "/no/python"])

    assert error.message =~ "`other/name`"
    assert_raise Error, ~r/other/, fn -> VLLM.child_spec([refused, model: "other/name"]) end
  end

  test "nothing is asked about another model" do
    options = [allowed_models: ["org/*"], python: "/no/python"]

    for ask <- [&VLLM.Quantization.detect/2, &VLLM.Hub.pull/2],
        do: assert({:error, %Error{reason: :not_allowed}} = ask.("other/name", options))
  end

  @tag :tmp_dir
  test "only models that may be named are listed, and they alone get names", %{tmp_dir: folder} do
    options = [env: %{"EX_VLLM_DATA" => folder, "HF_HOME" => folder}]
    path = VLLM.DemoModel.path("demo-awq")
    Models.register!(path, "theirs", options)
    :ok = Models.alias("theirs", "ours", options)
    configure(["ours*"])
    assert [%{name: "theirs", aliases: ["ours"]}] = Models.list!(options)
    configure(["others"])
    assert Models.list!(options) == []

    for refused <- [
          Models.get("theirs", options),
          Models.delete("theirs", options),
          Models.alias("theirs", "ours-too", options),
          Models.register(path, "ours-too", options)
        ],
        do: assert({:error, %Error{reason: :not_allowed}} = refused)
  end

  test "an engine goes over to no other model by a reload" do
    llm = VLLM.FakeEngine.start!("ready", allowed_models: ["ready"])
    assert {:error, %Error{reason: :not_allowed}} = VLLM.reload(llm, model: "hang")
    assert {:ok, "still there"} = VLLM.FakeEngine.ask(llm, "reply:still there")
  end
end
