defmodule VLLM.PromptTest do
  use ExUnit.Case, async: true

  alias VLLM.Bridge.MessagePack
  alias VLLM.{Error, Prompt}

  test "one prompt and a list of prompts are both lists on the wire" do
    assert Prompt.to_wire("a") == {:ok, ["a"]}
    assert Prompt.to_wire(["a", "b"]) == {:ok, ["a", "b"]}
    assert Prompt.to_wire([]) == {:ok, []}
  end

  test "token ids travel as little-endian u32" do
    expected = %{"prompt_token_ids" => MessagePack.bin(<<1, 0, 0, 0, 0, 1, 0, 0>>)}
    assert Prompt.to_wire(%{prompt_token_ids: [1, 256]}) == {:ok, [expected]}
    assert Prompt.to_wire([%{"prompt_token_ids" => [1, 256]}]) == {:ok, [expected]}
  end

  test "embeddings travel as they are, with their shape" do
    data = <<1.5::32-float-little, -1.0::32-float-little>>
    expected = %{"prompt_embeds" => MessagePack.bin(data), "shape" => [2, 1]}
    assert Prompt.to_wire(%{prompt_embeds: data, shape: {2, 1}}) == {:ok, [expected]}
    assert Prompt.to_wire(%{"prompt_embeds" => data, "shape" => {2, 1}}) == {:ok, [expected]}
  end

  describe "images" do
    test "travel as bytes and as URLs, in their order" do
      prompt = %{prompt: "<image>", multi_modal_data: %{image: {:binary, "bytes"}}}

      expected = %{
        "prompt" => "<image>",
        "multi_modal_data" => %{"image" => [MessagePack.bin("bytes")]}
      }

      assert Prompt.to_wire(prompt) == {:ok, [expected]}

      several = %{
        "prompt_token_ids" => [1],
        "multi_modal_data" => %{"image" => [{:url, "data:,"}, {:binary, <<255>>}]}
      }

      assert Prompt.to_wire(several) ==
               {:ok,
                [
                  %{
                    "prompt_token_ids" => MessagePack.bin(<<1, 0, 0, 0>>),
                    "multi_modal_data" => %{"image" => ["data:,", MessagePack.bin(<<255>>)]}
                  }
                ]}
    end

    @tag :tmp_dir
    test "are read from their files", %{tmp_dir: folder} do
      path = Path.join(folder, "image.png")
      File.write!(path, <<137, "PNG">>)
      prompt = %{prompt: "<image>", multi_modal_data: %{image: [{:file, path}]}}
      assert {:ok, [%{"multi_modal_data" => %{"image" => [data]}}]} = Prompt.to_wire(prompt)
      assert data == MessagePack.bin(<<137, "PNG">>)
    end

    for {what, prompt, hint} <- [
          {"that are not there", %{prompt: "a", multi_modal_data: %{image: {:file, "/none.png"}}},
           "no such file"},
          {"of no kind", %{prompt: "a", multi_modal_data: %{image: "photo.png"}},
           "An image is `{:file, path}`"},
          {"of none", %{prompt: "a", multi_modal_data: %{image: []}}, "at least one"},
          {"beside other media", %{prompt: "a", multi_modal_data: %{audio: {:binary, ""}}},
           "one key, `image`"},
          {"without a map", %{prompt: "a", multi_modal_data: {:binary, ""}}, "is a map"},
          {"without a prompt", %{multi_modal_data: %{image: {:binary, ""}}},
           "A prompt with images is"},
          {"with an empty prompt", %{prompt: "", multi_modal_data: %{image: {:binary, ""}}},
           "empty"}
        ] do
      test "#{what} are refused with what to do" do
        prompt = unquote(Macro.escape(prompt))
        assert {:error, %Error{reason: :invalid_prompt} = error} = Prompt.to_wire(prompt)
        assert error.message =~ unquote(hint)
      end
    end
  end

  for {what, prompt, hint} <- [
        {"an empty text", "", "empty"},
        {"no tokens", Macro.escape(%{prompt_token_ids: []}), "no token ids"},
        {"text that is not UTF-8", <<255>>, "UTF-8"},
        {"a negative token", Macro.escape(%{prompt_token_ids: [-1]}), "at least 0"},
        {"a token that is no number", Macro.escape(%{prompt_token_ids: ["1"]}), "at least 0"},
        {"tokens that are no list", Macro.escape(%{prompt_token_ids: 1}), "a list of integers"},
        {"bare token ids", [1, 2], "prompt_token_ids: [1, 2, 3]"},
        {"embeddings without a shape", Macro.escape(%{prompt_embeds: <<0::32>>}),
         "shape: {tokens"},
        {"embeddings of another size", Macro.escape(%{prompt_embeds: <<0::64>>, shape: {3, 1}}),
         "has 8 bytes; 32-bit floats of the shape {3, 1} have 12"},
        {"embeddings of no token", Macro.escape(%{prompt_embeds: "", shape: {0, 4}}),
         "one token"},
        {"embeddings of another rank",
         Macro.escape(%{prompt_embeds: <<0::64>>, shape: {1, 2, 1}}), "got the shape {1, 2, 1}"},
        {"something else", :atom, "A prompt is a string"}
      ] do
    test "#{what} is refused with what to do, and with its place in the list" do
      prompts = List.wrap(unquote(prompt))
      assert {:error, %Error{reason: :invalid_prompt} = error} = Prompt.to_wire(prompts)
      assert error.message =~ unquote(hint)
      assert error.details == %{"prompt_index" => 0}
    end
  end

  test "the place of a wrong prompt counts from 0" do
    assert {:error, %Error{details: %{"prompt_index" => 2}}} = Prompt.to_wire(["a", "b", ""])
  end
end
