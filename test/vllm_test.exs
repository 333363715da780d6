defmodule VLLMTest do
  use ExUnit.Case, async: true
  doctest VLLM

  alias VLLM.Error

  test "an unknown option of a call is an error with the nearest name" do
    assert {:error, %Error{reason: :invalid_option} = error} =
             VLLM.generate(:nobody, "x", timout: 5)

    assert error.details == %{
             "option" => "timout",
             "nearest" => "timeout",
             "remedy" => "Did you mean `timeout`?"
           }

    assert {:error, %Error{details: %{"nearest" => "max_tokens"}}} =
             VLLM.generate(:nobody, "x", max_token: 5)
  end

  test "options are keyword lists or maps, with atoms or strings as keys" do
    for options <- [[temperature: 0.5], %{temperature: 0.5}, %{"temperature" => 0.5}] do
      assert VLLM.sampling_params!(options).temperature == 0.5
    end

    assert {:error, %Error{reason: :invalid_option, message: message}} =
             VLLM.sampling_params([1, 2])

    assert message =~ "keyword list or a map"
  end

  test "a wrong value of an option of this library says which, what came and what is allowed" do
    assert {:error, %Error{reason: :invalid_option, message: message}} =
             VLLM.llm("model", replicas: 0)

    assert message == "`replicas` must be a positive integer; got 0."
    assert {:error, %Error{message: message}} = VLLM.generate(:nobody, "x", timeout: -1)

    assert message =~
             "`timeout` must be a positive number of milliseconds, up to 4294967295, or `:infinity`; got -1"
  end

  test "a wrong environment does not show its values" do
    assert {:error, %Error{message: message}} =
             VLLM.llm("model", env: %{"HF_TOKEN" => {:secret, "hf_abc"}})

    refute message =~ "hf_abc"
  end

  test "a model must be named" do
    assert_raise Error, ~r/name a folder, a GGUF file or a hub id with `model:`/, fn ->
      VLLM.child_spec(name: Nameless)
    end

    assert {:error, %Error{reason: :invalid_option}} = VLLM.llm(:not_a_string)
  end

  test "bang functions raise the error" do
    assert_raise Error, ~r/no engine :nobody/, fn -> VLLM.generate!(:nobody, "x") end
  end

  test "what can fail has a twin that raises, by its spec" do
    {:ok, specs} = Code.Typespec.fetch_specs(VLLM)

    failing =
      for {{name, arity}, clauses} <- specs,
          Enum.any?(clauses, &String.contains?(inspect(&1, limit: :infinity), "VLLM.Error")),
          do: {name, arity}

    assert length(failing) > 35
    twins = for {name, arity} <- failing, do: {:"#{name}!", arity}
    assert twins -- VLLM.__info__(:functions) == []
  end

  test "an engine of another node is no dead one: each call says that it cannot be reached" do
    # A pid as it comes from there.
    remote = :erlang.binary_to_term(<<131, 88, 119, 6, "a@host", 9::32, 0::32, 1::32>>)
    handle = %VLLM.LLM{id: VLLMTest.Elsewhere, model: "m", node: :a@host}

    for engine <- [remote, %{handle | id: remote}, handle, {VLLMTest.Elsewhere, :a@host}],
        call <- [&VLLM.stop/1, &VLLM.generate(&1, "x"), &VLLM.await_ready/1, &VLLM.replicas/1] do
      assert {:error, %Error{reason: :node_down} = error} = call.(engine)
      assert error.details == %{"node" => "a@host"}
    end

    assert_raise Error, fn -> VLLM.stop!(remote) end

    # What is for tests of one node says so.
    assert_raise Error, ~r/runs on the node a@host/, fn -> VLLM.Test.requests(handle) end

    # One that has ended on this node is just that.
    assert :ok = VLLM.stop(VLLMTest.Elsewhere)
    assert :ok = VLLM.stop(%{handle | node: node()})
    assert :ok = VLLM.stop({VLLMTest.Elsewhere, node()})
    assert :ok = VLLM.stop({:global, VLLMTest.Elsewhere})
    assert :ok = VLLM.stop({:via, NoSuchModule, :name})
  end

  test "text/1 takes one output or a list of them" do
    outputs =
      for text <- ["a", "b"] do
        %VLLM.RequestOutput{outputs: [%VLLM.CompletionOutput{text: text}]}
      end

    assert VLLM.text(outputs) == ["a", "b"]
    assert VLLM.text(hd(outputs)) == "a"
  end

  test "usage counts all completions of a prompt, and what is pooled has none" do
    completions = for ids <- [[1, 2, 3], [4]], do: %VLLM.CompletionOutput{token_ids: ids}
    output = %VLLM.RequestOutput{prompt_token_ids: [7, 8], outputs: completions}
    vector = %VLLM.Embedding{prompt_token_ids: [7, 8, 9], num_cached_tokens: 1}

    assert VLLM.usage(output) ==
             %{prompt_tokens: 2, completion_tokens: 4, total_tokens: 6, cached_tokens: 0}

    assert VLLM.usage(vector) ==
             %{prompt_tokens: 3, completion_tokens: 0, total_tokens: 3, cached_tokens: 1}

    assert VLLM.usage([]) ==
             %{prompt_tokens: 0, completion_tokens: 0, total_tokens: 0, cached_tokens: 0}
  end
end
